// What is connected to a node: deltas and models upstream, through reroutes, bypassed nodes, subgraphs and chained loaders.
import { graphs, nodes, rootGraph, widget } from "./host.js";
import { library } from "./library.js";
import { same } from "./toggles.js";

const SUBGRAPH_INPUT = -10;
const MUTED = 2;
const BYPASSED = 4;

/** Where the wire of an input comes from: `{node, slot}`s, several when a subgraph is used several times. */
export function sources(node, input) {
  const slot = node.inputs?.find((i) => i.name === input);
  return slot?.link == null ? [] : origins(node.graph, slot.link, new Set());
}

function origins(graph, id, seen) {
  const link = graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
  const key = `${graph.id}:${id}`;
  if (!link || seen.has(key)) return [];
  seen.add(key);
  if (link.origin_id === SUBGRAPH_INPUT) {
    return instances(graph).flatMap((n) => through(n, n.inputs?.[link.origin_slot], seen));
  }
  const node = graph.getNodeById(link.origin_id);
  if (!node || node.mode === MUTED) return [];
  if (node.isSubgraphNode?.()) {
    const inner = node.subgraph.outputs?.[link.origin_slot]?.linkIds?.[0];
    return inner == null ? [] : origins(node.subgraph, inner, seen);
  }
  const type = node.outputs?.[link.origin_slot]?.type;
  if (node.isVirtualNode) return through(node, node.inputs?.[0], seen);
  if (node.mode === BYPASSED) return through(node, node.inputs?.find((i) => i.type === type), seen);
  return [{ node, slot: link.origin_slot }];
}

const through = (node, input, seen) => (input?.link == null ? [] : origins(node.graph, input.link, seen));

function instances(subgraph) {
  return [...graphs()].flatMap((g) => (g.nodes ?? []).filter((n) => n.isSubgraphNode?.() && n.subgraph === subgraph));
}

const isOurs = (node, kind) => node.comfyClass === kind || node.type === kind;

/** Facts of the deltas that come in at an input, in their order; `missing` ones have at least a concept. */
export async function deltasAt(node, input = "deltas", seen = new Set()) {
  const found = [];
  for (const { node: source } of sources(node, input)) {
    if (seen.has(source)) continue;
    seen.add(source);
    if (isOurs(source, "SepMETrain")) {
      found.push(...(await deltasAt(source, "deltas", seen)), ...(await trained(source)));
    } else if (isOurs(source, "SepMELoadDelta")) {
      found.push(...(await deltasAt(source, "deltas", seen)), loaded(source));
    } else {
      for (const { name, type } of source.inputs ?? []) if (type === "DELTAS") found.push(...(await deltasAt(source, name, seen)));
    }
  }
  return found;
}

/** Facts of the delta that a loader loads; `missing` when it is not on the server. */
export function loaded(node) {
  const name = String(widget(node, "delta")?.value ?? "");
  const hash = String(widget(node, "content_hash")?.value ?? "").trim().toLowerCase();
  const facts = library.find(name, hash);
  if (facts) return { ...facts, renamed: facts.name !== name.replaceAll("\\", "/") };
  const record = recordOf(name, hash);
  const concept = record?.concept ?? name.replaceAll("\\", "/").split("/").pop().replace(/\.safetensors$/, "");
  return { name, concept, content_hash: hash, missing: true, embedded: typeof record?.data === "string", record };
}

/** What the workflow itself says of a delta. */
export function recordOf(name, hash) {
  const records = rootGraph()?.extra?.sepme ?? {};
  if (hash) return records[hash];
  return Object.values(records).find((r) => r?.file === name.replaceAll("\\", "/"));
}

/** The concepts that a training node makes deltas of; what it made last is in `node.sepmeMade`. */
async function trained(node) {
  const known = (await conceptsAt(node)).map((c) => c.name);
  const wanted = String(widget(node, "erase")?.value ?? "*").split(/[,\n]/).map((n) => n.trim()).filter(Boolean);
  const names = wanted.length === 1 && wanted[0] === "*" ? known : known.filter((n) => wanted.some((w) => same(w, n)));
  return names.map((concept) => node.sepmeMade?.find((d) => same(d.concept, concept)) ?? { concept, untrained: true });
}

const books = new Map();

async function conceptsAt(node, seen = new Set()) {
  const found = [];
  for (const { node: source } of sources(node, "concepts")) {
    if (seen.has(source)) continue;
    seen.add(source);
    found.push(...(await conceptsAt(source, seen)));
    const name = widget(source, "name")?.value?.trim?.();
    if (isOurs(source, "SepMEConcept") && name) found.push({ name });
    if (isOurs(source, "SepMEConceptBook")) found.push(...(await book(widget(source, "book")?.value ?? "")));
  }
  return found;
}

async function book(text) {
  if (!books.has(text)) {
    if (books.size > 20) books.clear();
    books.set(text, library.book(text).then((b) => b.concepts, () => []));
  }
  return books.get(text);
}

/** Deltas of every SepMEApply in the workflow: what a prompt's own toggles may name. */
export async function deltasOfWorkflow() {
  const found = new Map();
  for (const node of nodes()) {
    if (!isOurs(node, "SepMEApply")) continue;
    for (const delta of await deltasAt(node)) found.set(delta.concept, delta);
  }
  return [...found.values()];
}

/** Deltas of SepMEApply nodes further up: a node's toggles may name them too. */
export async function deltasBefore(node) {
  const found = [];
  const seen = new Set([node]);
  for (let at = modelBefore(node); at && !seen.has(at); at = modelBefore(at)) {
    seen.add(at);
    if (isOurs(at, "SepMEApply")) found.push(...(await deltasAt(at)));
  }
  return found;
}

function modelBefore(node) {
  const input = node.inputs?.find((i) => i.type === "MODEL");
  return input && sources(node, input.name)[0]?.node;
}

const architectures = new Map();

/** Architecture of the model that a node gets, by the checkpoint that it comes from; null when that cannot be seen from here. */
export async function architectureOf(node) {
  const seen = new Set([node]);
  let at = modelBefore(node);
  for (let before = at; before && !seen.has(before); before = modelBefore(at)) seen.add((at = before));
  if (!at) return null;
  const checkpoint = isOurs(at, "SepMEDemoModel") ? "" : widget(at, "ckpt_name")?.value;
  if (typeof checkpoint !== "string") return null;
  if (!architectures.has(checkpoint)) architectures.set(checkpoint, library.architecture(checkpoint).catch(() => null));
  return architectures.get(checkpoint);
}
