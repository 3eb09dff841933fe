// The sidebar tab: every delta on the server; installed by dropping a file, put into the graph by dragging.
import { api, app, changed, freePlace, nodes, toast } from "./host.js";
import { confirm, ask } from "./dialog.js";
import { bytes, el, figure, ownKeys } from "./dom.js";
import { install, isDelta } from "./install.js";
import { library } from "./library.js";
import { remember } from "./nodes.js";
import { t } from "./text.js";
import { architecturesOfWorkflow, linkOf } from "./wires.js";

const DRAGGED = "application/x-sepme-delta";
const ORDERS = {
  "sidebar.file": (a, b) => (a.name < b.name ? -1 : 1),
  "sidebar.concept": (a, b) => a.concept.localeCompare(b.concept),
  "sidebar.newest": (a, b) => b.date - a.date,
};
let shown = null; // the element that the tab is drawn in
let view = { order: "sidebar.file", fitting: false }; // as long as the page is open

export function registerSidebar() {
  app.extensionManager.registerSidebarTab({
    id: "sepme-concepts",
    icon: "pi pi-sliders-h",
    title: t("sidebar.title"),
    label: t("sidebar.title"),
    tooltip: t("sidebar.tooltip"),
    type: "custom",
    render: draw,
    destroy: () => (shown = null),
  });
  library.addEventListener("change", () => shown?.isConnected && list(shown));
  api.addEventListener("graphChanged", () => shown?.isConnected && view.fitting && list(shown));
  document.addEventListener("dragover", (event) => event.dataTransfer?.types.includes(DRAGGED) && event.preventDefault());
  document.addEventListener("drop", dropped, true);
}

function draw(element) {
  if (element.querySelector(".sepme-sidebar")) return;
  const search = el("input.sepme-search", { type: "search", placeholder: t("sidebar.search"), "aria-label": t("sidebar.search"), oninput: () => list(element) });
  const file = el("input", { type: "file", accept: ".safetensors", multiple: true, hidden: true, onchange: () => files(file.files) });
  const head = el("div.sepme-top", {}, el("h3", {}, t("sidebar.title")), icon("pi-refresh", "sidebar.reload", () => reload()), icon("pi-upload", "sidebar.install", () => file.click()));
  const target = el("div.sepme-droptarget", {}, t("sidebar.drop"));
  const options = Object.keys(ORDERS).map((key) => el("option", { value: key, selected: key === view.order }, t(key)));
  const order = el("select.sepme-order", { "aria-label": t("sidebar.order"), title: t("sidebar.order"), onchange: () => choose({ order: order.value }) }, ...options);
  const box = el("input", { type: "checkbox", checked: view.fitting, onchange: () => choose({ fitting: box.checked }) });
  const filter = el("div.sepme-filter", {}, order, el("label", { title: t("sidebar.fittingTip") }, box, t("sidebar.fitting")));
  const choose = (change) => ((view = { ...view, ...change }), list(element));
  const body = ownKeys(el("div.sepme.sepme-sidebar", {}, head, search, filter, target, el("div.sepme-deltas", { role: "list" }), file));
  body.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    event.stopPropagation();
    body.classList.add("sepme-over");
  });
  body.addEventListener("dragleave", (event) => body.contains(event.relatedTarget) || body.classList.remove("sepme-over"));
  body.addEventListener("drop", (event) => {
    body.classList.remove("sepme-over");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    event.stopPropagation();
    files(event.dataTransfer.files);
  });
  element.replaceChildren(body);
  shown = element;
  reload();
}

const icon = (name, key, onclick) => el("button.sepme-icon", { type: "button", title: t(key), "aria-label": t(key), onclick }, el(`i.pi.${name}`));

async function reload() {
  try {
    await library.load();
  } catch (error) {
    toast("error", t("sidebar.failed"), error.message);
  }
}

async function files(chosen) {
  for (const file of chosen) await install(file.name, file);
}

async function list(element) {
  const fits = view.fitting ? await architecturesOfWorkflow() : null;
  const words = element.querySelector(".sepme-search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = library.deltas.filter((d) => {
    const text = [d.concept, d.name, ...d.copies, d.architecture, d.fits, d.train?.objective, ...d.prompts].join(" ").toLowerCase();
    return words.every((w) => text.includes(w)) && (!fits || fits.has(d.architecture));
  });
  found.sort(ORDERS[view.order]);
  const open = new Set([...element.querySelectorAll("details[open]")].map((d) => d.dataset.name));
  const items = found.map((delta) => item(delta, open.has(delta.name)));
  const empty = t(library.deltas.length ? "sidebar.none" : "sidebar.empty");
  element.querySelector(".sepme-deltas").replaceChildren(...(items.length ? items : [el("div.sepme-empty", {}, empty)]));
}

function item(delta, open) {
  const fact = (key, value) => [el("dt", {}, t(`facts.${key}`)), el("dd", {}, value)];
  const facts = el(
    "dl",
    {},
    ...fact("file", [delta.name, ...delta.copies].join(", ")),
    ...fact("architecture", delta.fits ?? delta.architecture),
    ...fact("objective", [delta.train?.objective, delta.train?.mode].filter(Boolean).join(", ") || "–"),
    ...fact("size", `${bytes(delta.bytes)}, ${t("facts.rank", { rank: delta.rank })}`),
    ...fact("leak", `${figure(delta.leakage)} → ${figure(delta.leakage_gated)}`),
    ...fact("gate", `${figure(delta.gate)} (${figure(delta.gate_low)} … ${figure(delta.gate_high)})`),
    ...fact("touched", t("facts.ordinary", { share: ((delta.false_touch_rate ?? 0) * 100).toFixed(1) })),
    ...fact("prompts", delta.prompts.join(" · ")),
  );
  const actions = el(
    "div.sepme-line",
    {},
    el("button.sepme-small", { type: "button", onclick: () => addLoader(delta) }, t("sidebar.add")),
    el("button.sepme-small", { type: "button", onclick: () => rename(delta) }, t("sidebar.rename")),
    el("button.sepme-small.sepme-danger", { type: "button", onclick: () => remove(delta) }, t("sidebar.delete")),
  );
  const summary = el(
    "summary",
    { title: t("sidebar.drag") },
    delta.thumbnail ? el("img.sepme-thumbnail", { src: library.thumbnail(delta), loading: "lazy", alt: t("sidebar.thumbnail", delta), title: t("sidebar.thumbnail", delta), draggable: false }) : null,
    el(
      "div.sepme-what",
      {},
      el("div.sepme-line", {}, el(`span.sepme-dot.sepme-${delta.grade}`, { role: "img", title: t(`grade.${delta.grade}`), "aria-label": t(`grade.${delta.grade}`) }), el("b", {}, delta.concept)),
      el("div.sepme-where", { title: delta.name }, delta.name),
      el("div.sepme-where", {}, [new Date(delta.date).toLocaleDateString(), bytes(delta.bytes), delta.copies.length ? t("sidebar.copies", { count: delta.copies.length }) : ""].filter(Boolean).join(" · ")),
      el("span.sepme-tag", { title: t("facts.architecture") }, (delta.fits ?? delta.architecture).replace(/-[0-9a-f]{8}$/, "")),
    ),
  );
  const entry = el("details.sepme-delta", { role: "listitem", draggable: true, open }, summary, facts, actions);
  entry.dataset.name = delta.name;
  entry.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData(DRAGGED, delta.content_hash);
    event.dataTransfer.effectAllowed = "copy";
  });
  return entry;
}

function dropped(event) {
  const hash = event.dataTransfer?.getData(DRAGGED);
  if (!hash) return droppedFiles(event);
  event.preventDefault();
  event.stopImmediatePropagation();
  if (shown?.contains(event.target)) return;
  const delta = library.find("", hash);
  const at = app.clientPosToCanvasPos([event.clientX, event.clientY]);
  const under = app.canvas.graph.getNodeOnPos(at[0], at[1]);
  if (delta && under?.comfyClass === "SepMEErase") addRow(under, delta);
  else if (delta) addLoader(delta, at);
}

/** Delta files on the graph are installed and loaded; other .safetensors are the host's, which may find a workflow in them. */
async function droppedFiles(event) {
  const given = [...(event.dataTransfer?.files ?? [])];
  if (!given.length || shown?.contains(event.target) || !given.every((file) => /\.safetensors$/i.test(file.name))) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const at = app.clientPosToCanvasPos([event.clientX, event.clientY]);
  for (const file of given) {
    if (!(await isDelta(file))) await app.handleFile(file, "file_drop");
    else {
      const delta = await install(file.name, file);
      if (delta) await addLoader(delta, at);
    }
  }
}

/** A row of SepME Erase for a saved delta. */
const addRow = (node, delta) => node.sepmePanel.add([{ name: delta.concept, file: delta.name, content_hash: delta.content_hash }]);

/**
 * A loader of this delta in the graph that is shown, wired to the one SepMEApply there if there is just one: behind the loaders
 * that it has, so that all of them stay.
 */
async function addLoader(delta, position) {
  const graph = app.canvas.graph;
  const applies = graph.nodes.filter((n) => n.comfyClass === "SepMEApply");
  const rows = graph.nodes.filter((n) => n.comfyClass === "SepMEErase");
  if (!position && !applies.length && rows.length === 1) return addRow(rows[0], delta);
  const node = window.LiteGraph.createNode("SepMELoadDelta");
  node.pos = freePlace(graph, position ?? besides(applies[0]), node.size);
  graph.add(node);
  await remember(node, delta);
  if (applies.length === 1) chain(graph, node, applies[0]);
  app.canvas.selectNode?.(node);
  changed();
}

const besides = (apply) => (apply ? [apply.pos[0] - 360, apply.pos[1]] : app.canvas.ds?.convertCanvasToOffset?.([500, 300]) ?? [100, 100]);

/** Put a loader between an apply node and what it is fed by. */
function chain(graph, node, apply) {
  const slot = apply.inputs.findIndex((i) => i.name === "deltas");
  const link = linkOf(graph, apply.inputs[slot].link);
  const before = link && graph.getNodeById(link.origin_id);
  if (before) before.connect(link.origin_slot, node, node.inputs.findIndex((i) => i.name === "deltas"));
  node.connect(0, apply, slot);
}

async function rename(delta) {
  const name = await ask(t("sidebar.rename"), t("sidebar.newName"), delta.name);
  if (!name || name === delta.name) return;
  try {
    await library.rename(delta.name, name.endsWith(".safetensors") ? name : `${name}.safetensors`);
  } catch (error) {
    toast("error", t("sidebar.renameFailed"), error.message);
  }
}

async function remove(delta) {
  const used = [...nodes()].some((n) => n.comfyClass === "SepMELoadDelta" && n.widgets?.some((w) => w.value === delta.content_hash));
  const text = t(used ? "sidebar.deleteUsed" : "sidebar.deleteText", delta);
  if (!(await confirm(t("sidebar.deleteTitle", delta), text, t("sidebar.delete")))) return;
  try {
    await library.remove(delta);
  } catch (error) {
    toast("error", t("sidebar.deleteFailed"), error.message);
  }
}
