// Our nodes' widgets: the panel in place of the JSON text, a card on loaders; and when they are drawn anew.
import { api, app, changed, grow, nodes, rootGraph, serverIds, set, toast, widget } from "./host.js";
import { repairButton } from "./dialog.js";
import { bytes, el } from "./dom.js";
import { library } from "./library.js";
import { ErasePanel, erased } from "./erase.js";
import { TogglePanel } from "./panel.js";
import { inheritedBy } from "./runs.js";
import { markTexts, tags } from "./tags.js";
import { t, told } from "./text.js";
import { meant } from "./toggles.js";
import { architectureOf, deltasAt, deltasBefore, linkOf, loaded } from "./wires.js";

const PANEL = "SEPME_TOGGLES";
const ROWS = "SEPME_ROWS";
const INHERITS = ["SepMETextEncode", "SepMEConditioningToggles"];
const PANELS = ["SepMEApply", ...INHERITS];
const WIDTH = 320;
const MARGIN = 6;

/** Give the toggles of a node definition our widget; the input stays a STRING, so that a text can be wired to it. */
export function definePanel(definition) {
  const rows = definition.name === "SepMEErase" && definition.input?.required?.concepts;
  if (rows) rows[1] = { ...rows[1], widgetType: ROWS };
  if (!PANELS.includes(definition.name)) return;
  const spec = definition.input?.optional?.toggles ?? definition.input?.required?.toggles;
  if (spec) spec[1] = { ...spec[1], widgetType: PANEL };
}

export const customWidgets = {
  [PANEL](node, name, spec) {
    return ownPanel(node, name, new TogglePanel(INHERITS.includes(node.comfyClass), () => changed()), spec);
  },
  [ROWS](node, name, spec) {
    return ownPanel(node, name, new ErasePanel(() => (changed(), refresh())), spec);
  },
};

function ownPanel(node, name, panel, spec) {
  panel.value = spec[1]?.default ?? panel.value;
  node.sepmePanel = panel;
  return { widget: addPanel(node, name, panel, () => panel.value, (value) => (panel.value = value)), minWidth: WIDTH, minHeight: 1 };
}

const addPanel = (node, name, panel, getValue, setValue) =>
  node.addDOMWidget(name, panel instanceof ErasePanel ? ROWS : PANEL, panel.element, { getValue, setValue, getMinHeight: () => panel.height + 2 * MARGIN, hideOnZoom: false, margin: MARGIN });

/**
 * Panels of a subgraph's node in place of promoted toggles. Since front end 1.49 such a node has a value of its own for a promoted widget,
 * but draws none that is an extension's; before, the inner panel itself is shown there.
 */
function promotedPanels(node) {
  for (const input of node.inputs ?? []) {
    const held = input._widget;
    if (!input.widgetId || !node._extraWidgets) continue;
    if (!held?.sepmePanel) {
      if (![PANEL, ROWS].includes(held?.type)) continue;
      const inner = innermost(node, input);
      if (!inner) continue;
      const commit = (text) => ((held.value = text), changed(), refresh());
      const panel = held.type === ROWS ? new ErasePanel(commit) : new TogglePanel(INHERITS.includes(inner.comfyClass), commit);
      const made = addPanel(node, input.name, panel, () => held.value, (value) => (held.value = panel.value = value));
      node._extraWidgets.splice(node._extraWidgets.indexOf(made), 1); // it stands for the input, whose value is sent
      // another type, or Nodes 2.0 of front end 1.49 would keep what it drew for the widget before: nothing
      Object.assign(made, { sepmePanel: panel, sepmeInner: inner, type: `${held.type}_PROMOTED` });
      input._widget = made;
      node._setConcreteSlots?.();
      if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
    }
    input._widget.sepmePanel.value = input._widget.value;
  }
}

/** The node in a subgraph, or in one inside it, whose widget an input of the subgraph's node stands for. */
function innermost(node, input) {
  const slot = node.inputs.indexOf(input);
  const link = linkOf(node.subgraph, node.subgraph.inputs[slot]?.linkIds?.[0]);
  const inner = link && node.subgraph.getNodeById(link.target_id);
  return inner?.isSubgraphNode?.() ? innermost(inner, inner.inputs[link.target_slot]) : inner;
}

/** What a node needs once it is made. */
export function nodeMade(node) {
  if (!node.comfyClass?.startsWith("SepME")) return;
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...args) {
    refresh();
    return before?.apply(this, args);
  };
  if (node.comfyClass === "SepMELoadDelta") addCard(node);
  refresh();
}

/** A line below a loader's fields that says what the file holds; the hash is stored with the name, so that the file can be renamed. */
function addCard(node) {
  const element = el("div.sepme.sepme-card");
  const made = node.addDOMWidget("sepme_card", "SEPME_CARD", element, { serialize: false, getMinHeight: () => 76, getMaxHeight: () => 90, hideOnZoom: false, margin: MARGIN });
  made.serialize = false;
  node.sepmeCard = element;
  grow(node);
  const chosen = widget(node, "delta");
  const before = chosen.callback;
  chosen.callback = function (value, ...rest) {
    const answer = before?.call(this, value, ...rest);
    if (!node.sepmeRemembers) choose(node);
    return answer;
  };
  if (app.configuringGraph) return; // a workflow that names no hash means whatever the file holds
  setTimeout(() => {
    if (!widget(node, "content_hash").value) choose(node);
  });
}

/** Remember what a loader names; the host may know files that came after our list was read. */
async function choose(node) {
  const name = widget(node, "delta").value;
  if (name && !library.find(name, "")) await library.load().catch((error) => console.warn("SepME:", error.message));
  if (widget(node, "delta").value === name) await remember(node, library.find(name, ""));
}

/** Keep hash and recipe of a loader's delta in the workflow. */
export async function remember(node, delta) {
  if (!delta) return;
  const before = widget(node, "content_hash").value;
  node.sepmeRemembers = true;
  set(node, "delta", delta.name);
  set(node, "content_hash", delta.content_hash);
  node.sepmeRemembers = false;
  if (before !== delta.content_hash) forget(before);
  refresh();
  try {
    const records = await library.record(delta.name);
    if (widget(node, "content_hash").value === delta.content_hash) keep(records); // not when another one was chosen meanwhile
  } catch (error) {
    console.warn("SepME:", error.message); // the node says so itself when it runs
  }
  changed();
}

/** Take a record out of the workflow when no loader names it any more. */
function forget(hash) {
  for (const node of nodes()) if (node.comfyClass === "SepMELoadDelta" && widget(node, "content_hash")?.value === hash) return;
  delete rootGraph().extra?.sepme?.[hash];
}

/** Put records of deltas into the workflow; what they hold already (the file itself) stays. */
export function keep(records) {
  const extra = (rootGraph().extra ??= {});
  const saved = (extra.sepme ??= {});
  for (const [hash, record] of Object.entries(records)) saved[hash] = { ...saved[hash], ...record };
}

let waiting = false;
let later = 0;
const LATER = 400; // milliseconds in which Nodes 2.0 has put a text on the page

/** Draw panels and cards anew, once for all changes of this moment. */
export function refresh() {
  if (waiting) return;
  waiting = true;
  setTimeout(async () => {
    waiting = false;
    if (!library.ready) return;
    for (const node of nodes()) {
      if (node.sepmeCard) drawCard(node);
      if (node.sepmePanel) await drawPanel(node, node.sepmePanel);
      if (!node.isSubgraphNode?.()) continue;
      promotedPanels(node);
      for (const made of node.widgets ?? []) if (made.sepmeInner) await drawPanel(made.sepmeInner, made.sepmePanel, node);
    }
    await markTexts();
    clearTimeout(later);
    later = setTimeout(markTexts, LATER);
  });
}

/** Draw the panel of a node; `shown` is the node that it is on, the node itself or the subgraph's. */
async function drawPanel(node, panel, shown = node) {
  if (panel.inherits) return drawPromptPanel(node, panel, shown);
  if (panel instanceof ErasePanel) return drawErasePanel(node, panel, shown);
  const at = await deltasAt(node);
  const [found, hidden] = [at.deltas.filter((delta) => !delta.unset), at.hidden];
  const model = await architectureOf(node);
  const notes = [];
  for (const delta of found) {
    if (delta.missing) notes.push(t("panel.missing", { name: delta.concept }));
    if (!model || !delta.architecture || model.fits.includes(delta.architecture)) continue;
    delta.mismatch = t("panel.mismatch", { name: delta.concept, is: delta.fits ?? delta.architecture, model: model.architecture });
    notes.push(delta.mismatch);
  }
  if (hidden && found.length) notes.push(t("panel.more"));
  const earlier = await deltasBefore(node);
  return resize(shown, panel, () => panel.show(found, notes, earlier, hidden));
}

async function drawErasePanel(node, panel, shown) {
  panel.preserve = widget(node, "preserve") && { get: () => widget(node, "preserve").value, set: (text) => (set(node, "preserve", text), changed()) };
  panel.made = node.sepmeMade ?? [];
  const rows = erased(panel.value, panel.made);
  const model = await architectureOf(node);
  const notes = [];
  for (const delta of rows) {
    if (delta.missing) notes.push(t("panel.missing", { name: delta.concept }));
    else if (model && delta.architecture && !model.fits.includes(delta.architecture)) notes.push(t("panel.mismatch", { name: delta.concept, is: delta.fits ?? delta.architecture, model: model.architecture }));
  }
  return resize(shown, panel, () => panel.show(rows, notes));
}

async function drawPromptPanel(node, panel, shown) {
  const { deltas, hidden } = await inheritedBy(node);
  for (const { name, strength } of node.comfyClass === "SepMETextEncode" ? tags(widget(node, "text")?.value ?? "") : []) {
    for (const delta of name ? meant(name, deltas) : []) delta.tagged = strength;
  }
  return resize(shown, panel, () => panel.show(deltas, [], [], hidden));
}

/** Let a node grow with its panel; it never shrinks under the user's hands. */
function resize(node, panel, draw) {
  const before = panel.height;
  draw();
  const after = panel.height;
  panel.element.style.minHeight = `${after}px`;
  if (after === before) return;
  const size = node.computeSize();
  if (node.size[1] < size[1] || after < before) node.setSize([Math.max(node.size[0], WIDTH), Math.max(size[1], node.size[1] + after - before)]);
  node.graph?.setDirtyCanvas?.(true, true);
}

function drawCard(node) {
  const delta = loaded(node);
  const line = (...parts) => el("div.sepme-line", {}, ...parts);
  const record = rootGraph()?.extra?.sepme?.[delta.content_hash];
  const state = delta.unset
    ? [line(t("card.choose"))]
    : delta.missing
    ? [
        line(el("span.sepme-dot.sepme-lost"), t("card.missing", { name: delta.concept })),
        line(repairButton()),
      ]
    : [
        line(el(`span.sepme-dot.sepme-${delta.grade}`, { title: t(`grade.${delta.grade}`) }), el("b", {}, delta.concept), delta.fits ?? delta.architecture),
        line(`${t("facts.rank", { rank: delta.rank })} · ${bytes(delta.bytes)}${delta.renamed ? ` · ${t("card.renamed", { name: delta.name })}` : ""}`),
        el("label.sepme-line", { title: t("card.embedTip") }, el("input", { type: "checkbox", checked: !!record?.data, onchange: (event) => embed(delta, event.target) }), t("card.embed")),
      ];
  node.sepmeCard.replaceChildren(...state);
}

/** Put the file itself into the workflow, or take it out. */
async function embed(delta, box) {
  try {
    if (box.checked) keep(await library.record(delta.name, true));
    else delete rootGraph().extra?.sepme?.[delta.content_hash]?.data;
  } catch (error) {
    box.checked = false;
    toast("error", t("card.embedFailed"), error.message);
  }
  changed();
}

export function watch() {
  library.addEventListener("change", refresh);
  api.addEventListener("graphChanged", refresh);
  // what the host tells nobody at once: a bypass by keyboard, in Nodes 2.0 of front end 1.49
  for (const kind of ["keyup", "pointerup"]) document.addEventListener(kind, refresh, true);
  api.addEventListener("executed", ({ detail }) => {
    const records = detail?.output?.sepme;
    for (const record of Array.isArray(records) ? records : []) keep(record);
    if (records?.length) library.load().catch(() => {});
  });
  // heard before the host does, which shows it
  api.addEventListener("execution_error", ({ detail }) => {
    if (detail?.exception_type?.endsWith("SepMEError")) detail.exception_message = told(detail.exception_message.trim());
  }, true);
  api.addEventListener("sepme.notice", ({ detail }) => {
    const node = [...nodes()].find((n) => serverIds(n).includes(String(detail.node)));
    toast("warn", node?.title ?? "SepME", told(detail.text));
  });
  app.canvas?.canvas?.addEventListener("litegraph:set-graph", refresh);
}
