"""ComfyUI's page in a real browser, with the gestures of a user."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from comfyui.server import Run, Server

WAIT = 60_000  # milliseconds: two cores, a server and a browser on them

# helpers inside the page; everything else is done by mouse and keyboard
SCRIPT = """
window.sepmeTest = {
  node: (id) => { for (const g of [app.rootGraph ?? app.graph, ...((app.rootGraph ?? app.graph).subgraphs?.values?.() ?? [])]) {
    const found = (g.nodes ?? []).find((n) => String(n.id) === String(id)); if (found) return found; } },
  add: (kind, x, y, values) => { const n = LiteGraph.createNode(kind); n.pos = [x, y]; app.canvas.graph.add(n);
    for (const [k, v] of Object.entries(values ?? {})) n.widgets.find((w) => w.name === k).value = v; return n.id; },
  wire: (from, output, to, input) => { const a = sepmeTest.node(from), b = sepmeTest.node(to);
    a.connect(output, b, b.inputs.findIndex((i) => i.name === input)); },
  value: (id, name) => sepmeTest.node(id).widgets.find((w) => w.name === name).value,
  slot: (id, input, index) => app.canvasPosToClientPos(sepmeTest.node(id).getConnectionPos(input, index)),
  names: (id) => [...sepmeTest.node(id).sepmePanel.element.querySelectorAll(".sepme-name")].map((e) => e.textContent),
  enter: (id) => { const inner = sepmeTest.node(id).subgraph; app.canvas.openSubgraph?.(inner) ?? app.canvas.setGraph(inner); },
  set: (id, name, value) => { const n = sepmeTest.node(id); const w = n.widgets.find((w) => w.name === name);
    w.value = value; w.callback?.(value, app.canvas, n); },
};
"""


def run_prompt(server: Server, prompt: dict[str, Any]) -> Run:
    """Queue a prompt without the page; in a thread, for Playwright has an event loop in this one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(server.run, prompt).result()


class Page:
    """The front end of a server, with an empty workflow."""

    def __init__(self, browser: Any, server: Server, vue: bool, locale: str, size: tuple[int, int]) -> None:
        self.server, self.vue, self.locale = server, vue, locale
        self.errors: list[str] = []
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.tab.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))
        self.tab.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.load()

    def load(self) -> None:
        """Open the page as a user who knows ComfyUI already."""
        settings = {
            "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Locale": self.locale,
            "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.VueNodes.Enabled": self.vue, "Comfy.VueNodes.AutoScaleLayout": False,
            "Comfy.Workflow.Persist": False,
        }  # fmt: skip
        self.server.post("/settings", settings)
        self.tab.goto(self.server.url)
        self.tab.wait_for_function("window.app?.extensionManager && document.querySelector('.sepme-concepts-tab-button, [class*=side]')")
        self.tab.wait_for_function("LiteGraph.registered_node_types.SepMEApply && app.canvas?.graph")
        self.tab.evaluate(SCRIPT)
        self.tab.wait_for_timeout(500)

    def clear(self) -> Page:
        self.tab.keyboard.press("Escape")
        self.tab.evaluate("app.extensionManager.sidebarTab.activeSidebarTabId = null")
        self.load_workflow({"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "extra": {}, "version": 0.4})
        self.errors.clear()
        return self

    def close(self) -> None:
        self.context.close()

    def own_errors(self) -> list[str]:
        """Errors that name the pack; the front end's attempts to reach the internet, which the test's server forbids, are none."""
        return [e for e in self.errors if "sepme" in e.lower() and "Content Security Policy" not in e]

    # graph
    def load_workflow(self, workflow: dict[str, Any]) -> None:
        self.tab.evaluate("async (w) => { await app.loadGraphData(w); app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }", workflow)
        self.settle()

    def workflow(self) -> dict[str, Any]:
        saved: dict[str, Any] = self.tab.evaluate("JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()))")
        return saved

    def api_prompt(self) -> dict[str, Any]:
        prompt: dict[str, Any] = self.tab.evaluate("async () => (await app.graphToPrompt()).output")
        return prompt

    def add(self, kind: str, x: int = 100, y: int = 100, **values: Any) -> str:
        return str(self.tab.evaluate("([k, x, y, v]) => sepmeTest.add(k, x, y, v)", [kind, x, y, values]))

    def set(self, node: str, name: str, value: Any) -> None:
        """Set a widget as its own control does."""
        self.tab.evaluate("([n, w, v]) => sepmeTest.set(n, w, v)", [node, name, value])

    def wire(self, source: str, output: int, target: str, name: str) -> None:
        self.tab.evaluate("([a, o, b, i]) => sepmeTest.wire(a, o, b, i)", [source, output, target, name])

    def value(self, node: str, name: str) -> Any:
        return self.tab.evaluate("([n, w]) => sepmeTest.value(n, w)", [node, name])

    def toggles(self, node: str) -> dict[str, float]:
        return dict(json.loads(self.value(node, "toggles")))

    def settle(self, milliseconds: int = 250) -> None:
        """Let timers run and frames be drawn."""
        self.tab.wait_for_timeout(milliseconds)

    # panels
    def panel(self, node: str) -> Any:
        """The panel of a node."""
        handle = self.tab.evaluate_handle("(id) => sepmeTest.node(id).sepmePanel.element", node)
        return handle.as_element()

    def row(self, node: str, concept: str) -> Any:
        for row in self.panel(node).query_selector_all(".sepme-row"):
            if row.query_selector(".sepme-name").inner_text() == concept:
                return row
        raise AssertionError(f"no row {concept!r} in {self.names(node)}")

    def names(self, node: str) -> list[str]:
        return [e.inner_text() for e in self.panel(node).query_selector_all(".sepme-row:not([hidden]) .sepme-name")]

    def wait_rows(self, node: str, *names: str) -> None:
        self.tab.wait_for_function(
            "([id, names]) => JSON.stringify(sepmeTest.names(id)) === JSON.stringify(names)", arg=[node, list(names)]
        )
        self.settle()

    def switch(self, node: str, concept: str) -> None:
        self.row(node, concept).query_selector(".sepme-switch").click()
        self.settle(100)

    # the mouse on the canvas
    def drag_wire(self, source: str, output: int, target: str, name: str) -> None:
        index = self.tab.evaluate("([id, n]) => sepmeTest.node(id).inputs.findIndex((i) => i.name === n)", [target, name])
        start = self.tab.evaluate("([id, i]) => sepmeTest.slot(id, false, i)", [source, output])
        end = self.tab.evaluate("([id, i]) => sepmeTest.slot(id, true, i)", [target, index])
        mouse = self.tab.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=3)
        mouse.move(*end, steps=3)
        self.settle(60)
        mouse.up()
        self.settle(60)

    def search_node(self, words: str, x: int, y: int) -> str:
        """Double-click the canvas, type, press Enter: the new node's id. It lies at the double-click."""
        before = set(self.tab.evaluate("app.canvas.graph.nodes.map((n) => String(n.id))"))
        selector = "input[placeholder*='Search']:visible, .comfy-vue-node-search-container input:visible"
        for _ in range(5):  # on a busy machine two clicks are not always a double-click
            self.tab.mouse.dblclick(x, y)
            self.settle(600)
            if self.tab.query_selector(selector):
                break
        box = self.tab.wait_for_selector(selector)
        box.fill(words)
        self.settle(400)
        self.tab.keyboard.press("Enter")
        self.tab.wait_for_function("(n) => app.canvas.graph.nodes.length > n", arg=len(before))
        self.settle(100)
        (new,) = set(self.tab.evaluate("app.canvas.graph.nodes.map((n) => String(n.id))")) - before
        return str(new)

    def queue(self) -> dict[str, Any]:
        """Press Run and wait until the prompt is done; the outputs by node."""
        before = set(self.server.get("/history"))
        self.tab.locator("[data-testid='queue-button'] button, .queue-button-group button, button:has-text('Run')").first.click()
        for _ in range(WAIT // 200):
            self.settle(200)
            new = [run for name, run in self.server.get("/history").items() if name not in before]
            if new and new[0]["status"]:
                break
        (done,) = new
        assert done["status"]["status_str"] == "success", done["status"]
        self.settle()
        outputs: dict[str, Any] = done["outputs"]
        return outputs

    # files
    def drop_file(self, name: str, data: bytes, target: str = "#graph-canvas", kind: str = "") -> None:
        """Drop a file on an element, as from the desktop."""
        self.tab.evaluate(
            """([name, text, target, kind]) => {
              const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
              const data = new DataTransfer();
              data.items.add(new File([bytes], name, { type: kind }));
              const element = document.querySelector(target);
              for (const type of ["dragenter", "dragover", "drop"]) {
                const at = { clientX: 700, clientY: 500, bubbles: true, cancelable: true };
                element.dispatchEvent(new DragEvent(type, { dataTransfer: data, ...at }));
              }
            }""",
            [name, base64.b64encode(data).decode(), target, kind],
        )
        self.settle()

    def picture(self, path: Path, **options: Any) -> None:
        """A screenshot without toasts."""
        self.settle(300)
        self.tab.screenshot(path=str(path), style=".p-toast { display: none !important }", **options)
