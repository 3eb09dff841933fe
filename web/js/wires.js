// What is connected to a node: deltas and models upstream, as the graph is sent to the server: through reroutes, bypassed nodes,
// subgraphs, the wires that other packs hide, and chained loaders.
import { graphs, nodes, rootGraph, widget } from "./host.js";
import { erased } from "./erase.js";
import { library } from "./library.js";
import { same, splitNames } from "./toggles.js";

const SUBGRAPH_INPUT = -10; // a number, or since front end 1.49 its string
export const MUTED = 2;
export const BYPASSED = 4;

/** Where the wire of an input comes from: `{node, slot}`s, several when a subgraph is used several times. */
export function sources(node, input) {
  const index = node.inputs?.findIndex((i) => i.name === input) ?? -1;
  return index < 0 ? [] : into(node, index, new Set());
}

export const linkOf = (graph, id) => (id == null ? null : graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id]);

/** What comes in at an input, by number. Anything Everywhere keeps its wires in the graph's extra data. */
function into(node, index, seen) {
  const sent = () => node.graph.extra?.ue_links?.find((l) => String(l.downstream) === String(node.id) && l.downstream_slot === index);
  const broadcast = node.inputs?.[index]?.link == null && sent();
  if (broadcast) return along(node.graph, { origin_id: broadcast.upstream, origin_slot: broadcast.upstream_slot }, seen);
  return along(node.graph, linkOf(node.graph, node.inputs?.[index]?.link), seen);
}

/** Where a link starts; `seen` are the places on the way here, for a circle has no start. */
function along(graph, link, seen) {
  if (!link) return [];
  const place = `${graph.id}:${link.origin_id}:${link.origin_slot}`;
  const been = new Set(seen).add(place);
  if (seen.has(place)) return [];
  if (Number(link.origin_id) === SUBGRAPH_INPUT) return instances(graph).flatMap((n) => into(n, link.origin_slot, been));
  return from(graph.getNodeById(link.origin_id), link.origin_slot, been);
}

/** What an output hands out; the order of the questions is the host's own (ExecutableNodeDTO). */
function from(node, slot, seen) {
  if (!node || node.mode === MUTED) return [];
  if (node.mode === BYPASSED) {
    const type = node.outputs?.[slot]?.type;
    const index = node.inputs?.[slot]?.type === type ? slot : node.inputs?.findIndex((i) => i.type === type) ?? -1;
    return into(node, index, seen);
  }
  if (node.isSubgraphNode?.()) return along(node.subgraph, linkOf(node.subgraph, node.subgraph.outputs?.[slot]?.linkIds?.[0]), seen);
  if (node.isVirtualNode) return virtual(node, slot, seen);
  return [{ node, slot }];
}

/** Nodes that only the page knows: a Reroute, or the Get half of a Set and Get pair, which says itself what it stands for. */
function virtual(node, slot, seen) {
  if (node.findSetter && !node.findSetter(node.graph)) return []; // asked for its link it would complain in a toast, every time
  try {
    const far = node.resolveVirtualOutput?.(slot);
    if (far) return from(far.node, far.slot, seen);
    return along(node.graph, node.getInputLink?.(slot), seen);
  } catch {
    return [];
  }
}

/**
 * A widget's value as it is sent: of a promoted one what the outermost subgraph's node says. Undefined where a wire brings it, or where
 * the uses of a subgraph differ.
 */
export function sentValue(node, name) {
  const input = node.inputs?.find((i) => i.name === name);
  const link = linkOf(node.graph, input?.link);
  if (!link) return (widget(node, name) ?? input?._widget)?.value;
  if (Number(link.origin_id) !== SUBGRAPH_INPUT) return sources(node, name).length ? undefined : widget(node, name)?.value;
  const values = new Set(instances(node.graph).map((n) => sentValue(n, n.inputs[link.origin_slot]?.name)));
  return values.size === 1 ? [...values][0] : undefined;
}

function instances(subgraph) {
  return [...graphs()].flatMap((g) => (g.nodes ?? []).filter((n) => n.isSubgraphNode?.() && n.subgraph === subgraph));
}

export const isOurs = (node, kind) => node.comfyClass === kind || node.type === kind;

/**
 * Facts of the deltas that come in at an input, in their order; `missing` ones have at least a concept.
 * `hidden` says that more come from a node that does not say what it hands out.
 */
export async function deltasAt(node, input = "deltas", found = { deltas: [], hidden: false, seen: new Set() }) {
  if (isOurs(node, "SepMEErase") && input === "deltas") {
    const rows = sentValue(node, "concepts");
    if (rows === undefined) found.hidden = true;
    found.deltas.push(...erased(rows, node.sepmeMade));
  }
  for (const { node: source } of sources(node, input)) {
    if (found.seen.has(source)) continue;
    found.seen.add(source);
    const inputs = (source.inputs ?? []).filter((i) => i.type === "DELTAS" || i.type === "*");
    for (const { name } of inputs) await deltasAt(source, name, found);
    if (isOurs(source, "SepMETrain")) found.deltas.push(...(await trained(source)));
    else if (isOurs(source, "SepMELoadDelta")) found.deltas.push(loaded(source));
    else if (!inputs.length && source.outputs?.some((o) => o.type === "DELTAS" || o.type === "*")) found.hidden = true;
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
  return { name, concept, content_hash: hash, missing: true, unset: !name && !hash, embedded: typeof record?.data === "string", record };
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
  const wanted = splitNames(widget(node, "erase")?.value ?? "*");
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

/** Whether a node takes concepts off a MODEL. */
export const erases = (node) => isOurs(node, "SepMEApply") || isOurs(node, "SepMEErase");

/** The nodes of the workflow that take concepts off a MODEL and are in use. */
export const applies = () => [...nodes()].filter((n) => erases(n) && n.mode !== MUTED && n.mode !== BYPASSED);

/** Deltas of every such node in the workflow. */
export async function deltasOfWorkflow() {
  const found = new Map();
  for (const node of applies()) for (const delta of (await deltasAt(node)).deltas) found.set(delta.concept, delta);
  return [...found.values()];
}

/** The nodes that take concepts off what comes in at a node's MODEL, nearest first. */
export function appliesBefore(node) {
  const found = [];
  const seen = new Set([node]);
  for (let at = modelBefore(node); at && !seen.has(at); at = modelBefore(at)) {
    seen.add(at);
    if (erases(at)) found.push(at);
  }
  return found;
}

/** Deltas of SepMEApply nodes further up: a node's toggles may name them too. */
export async function deltasBefore(node) {
  const found = await Promise.all(appliesBefore(node).map((n) => deltasAt(n)));
  return found.flatMap((f) => f.deltas);
}

function modelBefore(node) {
  const input = node.inputs?.find((i) => i.type === "MODEL");
  return input && sources(node, input.name)[0]?.node;
}

const architectures = new Map();

/** Architectures that fit the model that a node gets, by the checkpoint that it comes from; null when that cannot be seen from here. */
export async function architectureOf(node) {
  const seen = new Set([node]);
  let at = modelBefore(node);
  for (let before = at; before && !seen.has(before); before = modelBefore(at)) seen.add((at = before));
  if (!at) return null;
  return architectureLoadedBy(at);
}

function architectureLoadedBy(loader) {
  const checkpoint = isOurs(loader, "SepMEDemoModel") ? "" : widget(loader, "ckpt_name")?.value;
  if (typeof checkpoint !== "string") return null;
  if (!architectures.has(checkpoint)) architectures.set(checkpoint, library.architecture(checkpoint).catch(() => null));
  return architectures.get(checkpoint);
}

/** Architectures that fit a checkpoint that the workflow loads; null when that cannot be seen from here. */
export async function architecturesOfWorkflow() {
  const loaders = [...nodes()].filter((n) => n.mode !== MUTED && n.mode !== BYPASSED);
  const found = (await Promise.all(loaders.map(architectureLoadedBy))).filter(Boolean);
  return found.length ? new Set(found.flatMap((a) => a.fits)) : null;
}
