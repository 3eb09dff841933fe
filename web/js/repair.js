// Deltas that a workflow names and the server has not: one dialog, one click a delta.
import { app, changed, freePlace, nodes, set, toast, widget } from "./host.js";
import { REPAIR, openDialog } from "./dialog.js";
import { el } from "./dom.js";
import { installRecord } from "./install.js";
import { library } from "./library.js";
import { remember } from "./nodes.js";
import { t } from "./text.js";
import { quoteName } from "./toggles.js";
import { erased } from "./erase.js";
import { linkOf, loaded, recordOf } from "./wires.js";

let told = ""; // what the last dialog was about: undo loads the workflow again, and need not ask again
let dialog = null;

/**
 * Loaders whose delta is not on the server, or is there under another name, and rows of SepME Erase whose file is not there;
 * `use` takes another delta, `anew` (of rows) works the concept out from its name.
 */
function broken() {
  const found = [];
  for (const node of nodes()) {
    if (node.comfyClass === "SepMEErase" && node.sepmePanel) {
      const panel = node.sepmePanel;
      for (const delta of erased(panel.value).filter((d) => d.missing)) {
        const record = recordOf(delta.name, delta.content_hash);
        const facts = { ...delta, record, embedded: typeof record?.data === "string" };
        found.push({ node, delta: facts, wanted: delta.name, use: (other) => panel.point(delta.concept, other), anew: () => panel.point(delta.concept) });
      }
    }
    if (node.comfyClass !== "SepMELoadDelta") continue;
    const delta = loaded(node);
    if ((delta.missing && !delta.unset) || delta.renamed) found.push({ node, delta, wanted: widget(node, "delta").value, use: (other) => remember(node, other) });
  }
  return found;
}

/** What a node's button asks for. */
document.addEventListener(REPAIR, () => openRepair());

/** After a workflow was loaded: say what is missing, once. A renamed file is found by the server too, so it alone is no reason. */
export async function checkWorkflow() {
  await library.load();
  const found = broken();
  const key = JSON.stringify(found.map(({ delta }) => [delta.content_hash, delta.name]));
  if (key !== told && found.some(({ delta }) => delta.missing)) openRepair();
  told = key;
}

function openRepair() {
  const content = el("div.sepme-repair");
  const draw = () => {
    const rows = broken();
    if (dialog && !rows.length) {
      dialog.close();
      toast("success", t("repair.done"));
    }
    content.replaceChildren(el("p", {}, t("repair.text")), ...rows.map((row) => entry(row, draw)));
    dialog?.focus(); // the button that had the focus is gone; outside, the host takes Escape for itself
  };
  dialog?.close();
  draw();
  library.addEventListener("change", draw);
  const mine = (dialog = openDialog(t("repair.title"), content));
  mine.addEventListener("close", () => {
    library.removeEventListener("change", draw);
    if (dialog === mine) dialog = null;
  });
}

function entry({ node, delta, wanted, use, anew }, draw) {
  const button = (key, call, values) =>
    el("button.sepme-button", { type: "button", onclick: async (event) => ((event.target.disabled = true), await call(), draw()) }, t(key, values));
  const ways = [];
  if (delta.renamed) ways.push(button("repair.use", () => use(library.find("", delta.content_hash)), delta));
  if (delta.embedded) ways.push(button("repair.install", () => unpack(delta, use)));
  for (const other of delta.missing ? library.ofConcept(delta.concept).slice(0, 3) : []) {
    ways.push(button("repair.other", () => use(other), other));
  }
  if (anew) ways.push(button("repair.anew", anew));
  else if (delta.missing && delta.record?.prompts) ways.push(button("repair.train", () => insertTraining(node, delta.record)));
  const hash = delta.content_hash ? el("code", { title: delta.content_hash }, delta.content_hash.slice(0, 16)) : "";
  return el(
    "div.sepme-missing",
    {},
    el("div.sepme-line", {}, el(delta.missing ? "span.sepme-dot.sepme-lost" : "span.sepme-dot.sepme-fair"), el("b", {}, delta.concept), hash),
    el("div.sepme-line", {}, delta.missing ? t("repair.wanted", { name: wanted }) : t("repair.found", delta)),
    el("div.sepme-line", {}, ...(ways.length ? ways : [t("repair.nothing")])),
  );
}

async function unpack(delta, use) {
  const facts = await installRecord(delta.record);
  if (!facts) return;
  if (delta.content_hash && facts.content_hash !== delta.content_hash) toast("warn", t("repair.otherContent"), facts.name);
  await use(facts);
}

/** The recipe as nodes: concept, what it must be separable from, training, saving, in place of the loader. */
function insertTraining(node, record) {
  const graph = node.graph;
  const make = (kind, x, y, values) => {
    const made = window.LiteGraph.createNode(kind);
    made.pos = [node.pos[0] + x, node.pos[1] + y];
    graph.add(made);
    for (const [name, value] of Object.entries(values)) {
      if (value != null) set(made, name, value);
    }
    return made;
  };
  const wire = (from, output, to, input) => from.connect(output, to, to.inputs.findIndex((i) => i.name === input));
  const known = [{ name: record.concept, prompts: record.prompts, anchor: record.anchor }, ...(record.known ?? []).map((k) => (typeof k === "string" ? { name: k } : k))];
  const book = make("SepMEConceptBook", -760, 0, { book: JSON.stringify({ concepts: known.map(plain), preserve: record.preserve ?? [] }, null, 1) });
  const train = make("SepMETrain", -340, 0, { erase: quoteName(record.concept), nearby: 0, ...record.train });
  const save = make("SepMESaveDeltas", 60, 0, {});
  wire(book, 0, train, "concepts");
  wire(train, 0, save, "deltas");
  bridge(graph, node, train, save);
  graph.remove(node);
  settle(graph, [book, train, save]);
  app.canvas.selectNodes?.([book, train, save]);
  changed();
  toast("info", t("repair.trainTitle"), t("repair.trainText"));
}

/** Move nodes together to where they lie on no others; in Nodes 2.0 they are drawn a little larger than the graph knows. */
function settle(graph, made) {
  const left = Math.min(...made.map((n) => n.pos[0]));
  const top = Math.min(...made.map((n) => n.pos[1]));
  const size = [Math.max(...made.map((n) => n.pos[0] + n.size[0])) - left, 1.2 * (Math.max(...made.map((n) => n.pos[1] + n.size[1])) - top)];
  const [, y] = freePlace(graph, [left, top], size, made);
  for (const n of made) n.pos = [n.pos[0], n.pos[1] + y - top];
}

/** A concept of a book without what is empty. */
const plain = ({ name, prompts, anchor }) => ({ name, ...(prompts?.length ? { prompts } : {}), ...(anchor ? { anchor } : {}) });

/** Wire the new branch as the loader was: deltas before it, those that read it, and the model that they are applied to. */
function bridge(graph, node, train, save) {
  const before = linkOf(graph, node.inputs.find((i) => i.name === "deltas")?.link);
  if (before) graph.getNodeById(before.origin_id)?.connect(before.origin_slot, train, train.inputs.findIndex((i) => i.name === "deltas"));
  for (const id of [...(node.outputs[0].links ?? [])]) {
    const link = linkOf(graph, id);
    const reader = graph.getNodeById(link.target_id);
    save.connect(0, reader, link.target_slot);
  }
  for (const [kind, input] of [["MODEL", "model"], ["CLIP", "clip"]]) {
    for (const other of graph.nodes) {
      const output = other.outputs?.findIndex((o) => o.type === kind) ?? -1;
      if (output < 0 || other.comfyClass === "SepMEApply") continue;
      other.connect(output, train, train.inputs.findIndex((i) => i.name === input));
      break;
    }
  }
}
