// Which prompts are drawn by which model: what a prompt node inherits, and texts whose tags nobody reads.
import { acting, parseRows } from "./erase.js";
import { nodes } from "./host.js";
import { key, meant, parse } from "./toggles.js";
import { BYPASSED, MUTED, applies, appliesBefore, deltasAt, isOurs, sentValue, sources } from "./wires.js";

/** Nodes that read tags: our own encode node, and core's, which the server reads as ours. */
export const readsTags = (node) => isOurs(node, "SepMETextEncode") || isOurs(node, "CLIPTextEncode");

const PASSES_TEXT = new Set(["CONDITIONING", "STRING", "*"]);

/** Every sampler (or guider) on a MODEL with deltas: `applies` nearest first, and the nodes that its prompts come through. */
export function runs() {
  const found = [];
  for (const node of nodes()) {
    const types = new Set(node.inputs?.map((i) => i.type));
    if (node.mode === MUTED || node.mode === BYPASSED || !types.has("MODEL") || !types.has("CONDITIONING")) continue;
    const before = appliesBefore(node);
    if (before.length) found.push({ applies: before, readers: readers(node) });
  }
  return found;
}

/** The nodes that a node's prompts come through; what is read with its tags is not followed further. */
function readers(node, found = new Set()) {
  for (const { name, type } of node.inputs ?? []) {
    if (!PASSES_TEXT.has(type)) continue;
    for (const { node: source } of sources(node, name)) {
      if (found.has(source)) continue;
      found.add(source);
      if (!readsTags(source)) readers(source, found);
    }
  }
  return found;
}

/**
 * Facts of the deltas that act on a prompt node's prompts, `inherited` being the strength of each without the node's own toggles.
 * Undefined where runs differ. Of a node that no sampler reads yet: as if every SepMEApply did.
 */
export async function inheritedBy(node) {
  const mine = runs().filter((run) => run.readers.has(node));
  const chains = mine.length ? mine.map((run) => run.applies) : applies().map((apply) => [apply]);
  const found = new Map();
  let hidden = false;
  for (const chain of chains) {
    const acting = await effects(chain);
    hidden ||= acting.hidden;
    for (const [name, delta] of acting.deltas) {
      const other = found.get(name);
      found.set(name, other && other.inherited !== delta.inherited ? { ...delta, inherited: undefined } : delta);
    }
  }
  const deltas = [...found.values()];
  set(deltas, earlierToggles(node));
  return { deltas, hidden };
}

function set(deltas, entries) {
  for (const [name, strength] of entries) for (const delta of meant(name, deltas)) delta.inherited = strength;
}

/** What a chain of SepMEApply nodes does, nearest first: of two that name a concept the nearer one counts. */
async function effects(chain) {
  const deltas = new Map();
  let hidden = false;
  for (const apply of chain) {
    const found = await deltasAt(apply);
    hidden ||= found.hidden;
    for (const delta of found.deltas) deltas.set(key(delta.concept), { ...delta, inherited: 1 });
  }
  for (const apply of [...chain].reverse()) {
    const entries = own(apply);
    for (const delta of deltas.values()) if (!entries) delta.inherited = undefined; // its toggles come by wire, from a node that makes them
    set([...deltas.values()], entries ?? []);
  }
  return { deltas, hidden };
}

/** A node's own toggles; null when a wire brings them. */
function own(node) {
  if (isOurs(node, "SepMEErase")) return parseRows(sentValue(node, "concepts"))?.map((row) => [row.name, acting(row)]) ?? null;
  const text = sentValue(node, "toggles");
  return text === undefined && node.inputs?.some((i) => i.name === "toggles" && i.link != null) ? null : parse(text);
}

/** Toggles of our prompt nodes further up: they came with the prompt, and later ones go before them. */
function earlierToggles(node, seen = new Set()) {
  const before = sources(node, "conditioning")[0]?.node;
  if (!before || seen.has(before)) return [];
  seen.add(before);
  return [...earlierToggles(before, seen), ...(own(before) ?? [])];
}
