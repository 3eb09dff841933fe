"""ComfyUI's page in a real browser, with the gestures of a user. Nothing waits for a time, all for what is to be seen."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from comfyui.server import Run, Server
from playwright.sync_api import Error, TimeoutError, expect

WAIT = 60_000  # milliseconds until something counts as not happening: two cores, a server and a browser on them
expect.set_options(timeout=WAIT)

# helpers inside the page; everything else is done by mouse and keyboard
SCRIPT = """
window.sepmeTest = {
  node: (id) => { const root = app.rootGraph ?? app.graph;
    for (const g of [app.canvas.graph, root, ...(root.subgraphs?.values?.() ?? [])]) {
    const found = (g.nodes ?? []).find((n) => String(n.id) === String(id)); if (found) return found; } },
  add: (kind, x, y, values) => { const n = LiteGraph.createNode(kind); n.pos = [x, y]; app.canvas.graph.add(n);
    for (const [k, v] of Object.entries(values ?? {})) n.widgets.find((w) => w.name === k).value = v; return n.id; },
  wire: (from, output, to, input) => { const a = sepmeTest.node(from), b = sepmeTest.node(to);
    a.connect(output, b, b.inputs.findIndex((i) => i.name === input)); },
  value: (id, name) => sepmeTest.node(id).widgets.find((w) => w.name === name).value,
  slot: (id, input, index) => app.canvasPosToClientPos(sepmeTest.node(id).getConnectionPos(input, index)),
  ids: (kind) => app.canvas.graph.nodes.filter((n) => !kind || n.type === kind).map((n) => String(n.id)),
  enter: (id) => app.canvas.openSubgraph(sepmeTest.node(id).subgraph, sepmeTest.node(id)),
  // what "Promote Widget" does: front end 1.32 notes it on the subgraph's node, newer ones make it an input of the subgraph
  promote: (id, name) => { const outer = sepmeTest.node(id);
    const inner = outer.subgraph.nodes.find((n) => n.widgets?.some((w) => w.name === name));
    if (outer.properties.proxyWidgets) { outer.properties.proxyWidgets = [[String(inner.id), name]]; return; }
    const slot = inner.inputs.find((i) => i.widget?.name === name);
    outer.subgraph.addInput(name, String(slot.type)).connect(slot, inner); },
  set: (id, name, value) => { const n = sepmeTest.node(id); const w = n.widgets.find((w) => w.name === name);
    w.value = value; w.callback?.(value, app.canvas, n); },
  part: (id, name) => { const e = sepmeTest.node(id)[name]; (e.element ?? e).dataset.test = `${name}-${id}`; },
  // nodes of other packs: Set and Get, known to the page alone, as KJNodes and Easy-Use make them; and what no pack tells us of
  others: () => {
    const own = (name, virtual, type) => { class Made extends LiteGraph.LGraphNode {
        constructor(title) { super(title ?? name); this.isVirtualNode = virtual; this.addWidget("text", "key", "", () => {});
          if (type !== "get") this.addInput("in", "*"); if (type !== "set") this.addOutput("out", "*"); }
        findSetter(graph) { return graph.nodes.find((n) => n.type === "TestSet" && n.widgets[0].value === this.widgets[0].value); }
        getInputLink(slot) { if (type !== "get") return super.getInputLink(slot);
          const setter = this.findSetter(this.graph); if (!setter) throw new Error("No setter");
          return this.graph.getLink(setter.inputs[slot].link); } }
      LiteGraph.registerNodeType(name, Made); };
    own("TestSet", true, "set"); own("TestGet", true, "get"); own("TestForeign", false, "get"); },
  frames: () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))),
  run: null,
};
for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
  app.api.addEventListener(kind, ({ detail }) => { sepmeTest.run = { ...detail, kind }; });
"""
CONCEPTS = ".side-bar-button:has(.pi-sliders-h)"  # by its icon: the tab's own class has come and gone
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "extra": {}, "version": 0.4}


def run_prompt(server: Server, prompt: dict[str, Any]) -> Run:
    """Queue a prompt without the page; in a thread, for Playwright has an event loop in this one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(server.run, prompt).result()


class Page:
    """The front end of a server, once :meth:`load` has opened it."""

    def __init__(self, browser: Any, server: Server, vue: bool, locale: str, size: tuple[int, int]) -> None:
        self.server, self.vue, self.locale = server, vue, locale
        self.errors: list[str] = []
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.context.add_init_script("localStorage.setItem('vueNodesBannerDismissed', 'true')")
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.tab.on("pageerror", lambda error: self.errors.append(f"{error}\n{error.stack or ''}"))
        self.tab.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)

    def load(self) -> None:
        """Open the page as a user who knows ComfyUI already."""
        settings = {
            "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False, "Comfy.Locale": self.locale,
            "Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.VueNodes.Enabled": self.vue, "Comfy.VueNodes.AutoScaleLayout": False,
            "Comfy.Workflow.Persist": False, "Comfy.EnableWorkflowViewRestore": False,
        }  # fmt: skip
        self.server.post("/settings", settings)
        self.tab.goto(self.server.url)
        self.tab.wait_for_selector(CONCEPTS)
        self.until("window.LiteGraph?.registered_node_types.SepMEApply && window.app?.canvas?.graph && app.extensionManager")
        self.until("async () => (await import('/extensions/comfyui-sepme/js/library.js')).library.ready")
        self.tab.evaluate(SCRIPT)

    def clear(self) -> Page:
        """An empty workflow in the tab that is open: no dialog, no sidebar."""
        self.tab.evaluate("document.querySelectorAll('dialog[open]').forEach((d) => d.close())")
        self.tab.keyboard.press("Escape")
        self.tab.evaluate("app.extensionManager.sidebarTab.activeSidebarTabId = null")
        self.load_workflow(EMPTY, here=True)
        self.errors.clear()
        return self

    def answers(self) -> bool:
        """Whether the tab is there and runs scripts."""
        with suppress(Error):
            self.tab.wait_for_function("true", timeout=20_000)
            return True
        return False

    def close(self) -> None:
        with suppress(Error):  # it has gone with the browser
            self.context.close()

    def own_errors(self) -> list[str]:
        """Errors that name the pack; the front end's attempts to reach the internet, which the test's server forbids, are none."""
        return [e for e in self.errors if "sepme" in e.lower() and "Content Security Policy" not in e]

    # waiting
    def until(self, script: str, arg: Any = None) -> None:
        """Wait for an expression of the page to be true."""
        self.tab.wait_for_function(script, arg=arg)

    def sees(self, read: Callable[[], Any], expected: Any) -> None:
        """Wait until what is read is what is expected."""
        for _ in range(WAIT // 100):
            if read() == expected:
                return
            self.tab.wait_for_timeout(100)
        assert read() == expected

    def look(self) -> None:
        """Press a key that does nothing: the page looks for changes after a key or a click; a script's are not heard of."""
        self.tab.keyboard.press("Shift")

    def frames(self) -> None:
        """Let the page draw what it has to."""
        self.tab.evaluate("sepmeTest.frames()")

    # graph
    def load_workflow(self, workflow: dict[str, Any], here: bool = False) -> None:
        """Open a workflow, in a tab of its own or in the one that is shown."""
        self.tab.evaluate(
            "([workflow, here]) => app.loadGraphData(workflow, true, true, here ? app.extensionManager.workflow.activeWorkflow : null)",
            [workflow, here],
        )
        self.home()

    def home(self) -> None:
        """The canvas unmoved and at its own size; newer front ends move it when a workflow is opened or a node is placed."""
        self.frames()
        self.tab.evaluate("app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true)")
        self.frames()

    def workflow(self) -> dict[str, Any]:
        saved: dict[str, Any] = self.tab.evaluate("JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()))")
        return saved

    def api_prompt(self) -> dict[str, Any]:
        prompt: dict[str, Any] = self.tab.evaluate("async () => (await app.graphToPrompt()).output")
        return prompt

    def ids(self, kind: str = "") -> list[str]:
        """Of the nodes of the graph that is shown."""
        found: list[str] = self.tab.evaluate("(kind) => sepmeTest.ids(kind)", kind)
        return found

    def add(self, kind: str, x: int = 100, y: int = 100, **values: Any) -> str:
        return str(self.tab.evaluate("([k, x, y, v]) => sepmeTest.add(k, x, y, v)", [kind, x, y, values]))

    def set(self, node: str, name: str, value: Any) -> None:
        """Set a widget as its own control does."""
        self.tab.evaluate("([n, w, v]) => sepmeTest.set(n, w, v)", [node, name, value])

    def wire(self, source: str, output: int, target: str, name: str) -> None:
        self.tab.evaluate("([a, o, b, i]) => sepmeTest.wire(a, o, b, i)", [source, output, target, name])

    def value(self, node: str, name: str) -> Any:
        return self.tab.evaluate("([n, w]) => sepmeTest.value(n, w)", [node, name])

    def wait_toggles(self, node: str, expected: dict[str, float]) -> None:
        """Wait for the node's value: names and strengths, in this order."""
        self.sees(lambda: list(json.loads(self.value(node, "toggles")).items()), list(expected.items()))

    # what we draw on nodes
    def part(self, node: str, name: str) -> Any:
        """The element of a node's ``sepmePanel``, ``sepmeCard`` or ``sepmeTraining``."""
        self.until("([id, name]) => sepmeTest.node(id)?.[name]", [node, name])
        self.tab.evaluate("([id, name]) => sepmeTest.part(id, name)", [node, name])
        return self.tab.locator(f"[data-test='{name}-{node}']")

    def text(self, node: str) -> Any:
        """The text area of a node's first widget, in canvas."""
        self.home()  # or what is at the edge could be below a menu
        self.until("(id) => sepmeTest.node(id).widgets[0].element.isConnected", node)
        self.tab.evaluate("(id) => { sepmeTest.node(id).widgets[0].element.dataset.test = `text-${id}`; }", node)
        return self.tab.locator(f"[data-test='text-{node}']")

    def panel(self, node: str) -> Any:
        return self.part(node, "sepmePanel")

    def row(self, node: str, concept: str) -> Any:
        name = self.tab.locator(f".sepme-name:text-is({json.dumps(concept)})")
        return self.panel(node).locator(".sepme-row").filter(has=name)

    def wait_rows(self, node: str, *names: str) -> None:
        """Wait for the rows that a panel shows."""
        expect(self.panel(node).locator(".sepme-row:not([hidden]) .sepme-name")).to_have_text(list(names))

    def switch(self, node: str, concept: str) -> None:
        button = self.row(node, concept).locator(".sepme-switch")
        before = button.get_attribute("aria-checked")
        button.click()
        expect(button).not_to_have_attribute("aria-checked", before)

    # the mouse on the canvas
    def select(self, node: str) -> None:
        """Click a node's title."""
        x, y = self.tab.evaluate("(id) => app.canvasPosToClientPos([sepmeTest.node(id).pos[0] + 60, sepmeTest.node(id).pos[1] - 14])", node)
        self.tab.mouse.click(x, y)
        self.until("(id) => app.canvas.selectedItems.has(sepmeTest.node(id))", node)

    def drag_wire(self, source: str, output: int, target: str, name: str) -> None:
        index = self.tab.evaluate("([id, n]) => sepmeTest.node(id).inputs.findIndex((i) => i.name === n)", [target, name])
        mouse = self.tab.mouse
        for _ in range(3):  # a frame that is late can swallow a press
            start = self.tab.evaluate("([id, i]) => sepmeTest.slot(id, false, i)", [source, output])
            end = self.tab.evaluate("([id, i]) => sepmeTest.slot(id, true, i)", [target, index])
            mouse.move(*start)
            self.frames()
            mouse.down()
            mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, steps=3)
            mouse.move(*end, steps=3)
            self.frames()
            mouse.up()
            self.frames()
            if self.tab.evaluate("([id, i]) => sepmeTest.node(id).inputs[i].link != null", [target, index]):
                return
        raise AssertionError(f"no wire could be drawn from {source} to {name!r} of {target}")

    def search_node(self, words: str, x: int, y: int) -> str:
        """Double-click the canvas, type, choose: the new node's id. It lies at the double-click."""
        before = set(self.ids())
        box = self.tab.locator("input[role='combobox']:visible").first
        for _ in range(8):  # on a busy machine two clicks are not always a double-click
            self.tab.mouse.dblclick(x, y)
            with suppress(Error):
                box.wait_for(timeout=3000)
                break
        box.fill(words)
        for _ in range(5):  # a list that is drawn anew under the mouse swallows a click
            with suppress(Error):
                self.tab.locator(f"[role='option']:has-text({json.dumps(words)})").first.click(timeout=5000)
                box.wait_for(state="hidden", timeout=5000)
                break
        self.sees(lambda: len(self.ids()), len(before) + 1)
        self.tab.mouse.click(x, y)  # newer front ends let the node follow the mouse until then
        self.home()
        (new,) = set(self.ids()) - before
        self.tab.evaluate("([id, at]) => { sepmeTest.node(id).pos = app.clientPosToCanvasPos(at); }", [new, [x, y]])
        self.frames()
        return new

    def promote(self, outer: str, name: str) -> None:
        """Show a widget of a subgraph on the subgraph's node, as the menu of the widget does."""
        self.tab.evaluate("([id, name]) => sepmeTest.promote(id, name)", [outer, name])
        self.frames()

    def run(self) -> dict[str, Any]:
        """Press Run and wait until the prompt is done; how it ended, as the host was told."""
        self.tab.evaluate("sepmeTest.run = null")
        names = ", ".join(f"button:visible:has-text('{name}')" for name in ("Run", "运行"))
        self.tab.locator(f"button[data-testid='queue-button']:visible, {names}").first.click()
        idle = 0
        for _ in range(60):  # five minutes: training, on a machine that others use too
            with suppress(TimeoutError):
                self.tab.wait_for_function("sepmeTest.run", timeout=5000)
                done: dict[str, Any] = self.tab.evaluate("sepmeTest.run")
                return done
            self.server.check()
            queue = self.server.get("/queue")
            idle = 0 if any(queue.values()) else idle + 1
            assert idle < 3, "nothing runs, and the page has not heard how it ended"
        raise self.server.silent()

    def queue(self) -> dict[str, Any]:
        """Run without an error; the outputs by node."""
        done = self.run()
        assert done["kind"] == "execution_success", done
        self.sees(lambda: bool(self.server.get(f"/history/{done['prompt_id']}")), True)  # it is written a moment later
        self.frames()
        outputs: dict[str, Any] = self.server.get(f"/history/{done['prompt_id']}")[done["prompt_id"]]["outputs"]
        return outputs

    def wait_toast(self, text: str) -> None:
        """Wait for a toast that says so; front end 1.58 has other ones than those before."""
        self.tab.locator(".p-toast-message, [role=alert], [data-testid*='toast']").filter(has_text=text).first.wait_for()

    # the pack's own places
    def open_concepts(self) -> Any:
        """The sidebar tab."""
        sidebar = self.tab.locator(".sepme-sidebar")
        if not sidebar.is_visible():
            self.tab.locator(CONCEPTS).click()
        sidebar.wait_for()
        return sidebar

    def dialog(self, title: str) -> Any:
        return self.tab.locator("dialog[open]").filter(has=self.tab.locator(f"h2:text-is({json.dumps(title)})"))

    def answer(self, title: str, button: str) -> None:
        """Press a dialog's button; it closes."""
        self.dialog(title).locator(f"button:text-is({json.dumps(button)})").click()
        expect(self.dialog(title)).to_have_count(0)

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

    def picture(self, path: Path, **options: Any) -> None:
        """A screenshot without toasts."""
        self.frames()
        self.tab.screenshot(path=str(path), style=".p-toast { display: none !important }", **options)
