// Tags in the texts of nodes: names without a delta, tags that cannot be read, and tags where nobody reads them.
import { app, nodes } from "./host.js";
import { el } from "./dom.js";
import { readsTags, runs } from "./runs.js";
import { t } from "./text.js";
import { meant } from "./toggles.js";
import { applies, deltasAt, isOurs } from "./wires.js";

const TAG = /<(erase|keep):([^<>:]*)(?::([^<>:]*))?>/gi;
const LIKE = /(?:[<＜〈《‹«]|&lt;)\s*[/\\]?\s*(?:erase|keep)(?=[\s:：︰﹕∶;；=>＞〉》›»&]|$)[^<＜\n]*/gi; // what somebody means as a tag

/** The tags of a text: `{name, strength, text}`; what only looks like one has no name. */
export function tags(text) {
  const found = [];
  const rest = String(text).replace(TAG, (all, kind, name, strength) => {
    const value = kind.toLowerCase() === "keep" ? (strength === undefined ? 0 : NaN) : Number(strength ?? 1);
    const good = name.trim() && strength?.trim() !== "" && Math.abs(value) <= 100;
    found.push(good ? { name: name.trim(), strength: value, text: all } : { text: all });
    return " ";
  });
  return [...found, ...(rest.match(LIKE) ?? []).map((broken) => ({ text: broken.trim().slice(0, 40) }))];
}

/** The node that a text area is a widget of: the widget's own element (canvas), or drawn inside the node (Nodes 2.0). */
export function nodeOf(area) {
  if (area?.tagName !== "TEXTAREA") return null;
  const id = area.closest("[data-node-id]")?.dataset.nodeId;
  if (id) return app.canvas?.graph?.getNodeById(id) ?? app.canvas?.graph?.getNodeById(Number(id)) ?? null;
  const has = (node) => node.widgets?.some((w) => (w.inputEl ?? w.element)?.contains?.(area));
  return [...nodes()].find(has) ?? null;
}

/** Whether tags mean something in a node's texts, or people think that they do: prompts, but none of our books and lists. */
export const takesTags = (node) => !!node && (isOurs(node, "SepMETextEncode") || !node.comfyClass?.startsWith("SepME"));

/** Say on every text that is shown what is wrong with its tags. */
export async function markTexts() {
  const areas = [...document.querySelectorAll("textarea")].map((area) => ({ area, node: nodeOf(area) }));
  const tagged = areas.filter(({ area, node }) => takesTags(node) && area.value.search(LIKE) >= 0);
  const found = tagged.length ? await Promise.all(applies().map((n) => deltasAt(n))) : [];
  const known = found.some((f) => f.hidden) ? null : found.flatMap((f) => f.deltas);
  const reading = found.length ? runs() : [];
  for (const { area, node } of areas) {
    const mine = found.length && tagged.some((one) => one.area === area);
    show(area, mine ? problems(node, area.value, known, reading) : []);
  }
}

function problems(node, text, known, reading) {
  const inner = node.isSubgraphNode?.() ? node.subgraph.nodes.filter((n) => n.widgets?.some((w) => w.value === text)) : [node];
  const words = inner.some((n) => !readsTags(n) && reading.some((run) => run.readers.has(n)));
  const wrong = words ? [t("tags.words")] : [];
  for (const tag of tags(text)) {
    if (!tag.name) wrong.push(t("tags.broken", tag));
    else if (known && !meant(tag.name, known).length) wrong.push(t("tags.unknown", tag));
  }
  return [...new Set(wrong)];
}

function show(area, sentences) {
  const before = area.parentElement?.querySelector(":scope > .sepme-tags");
  if (!sentences.length) return before?.remove();
  const note = before ?? el("div.sepme.sepme-tags", { role: "alert" });
  if (note.textContent !== sentences.join("")) note.replaceChildren(...sentences.map((text) => el("div", {}, text)));
  if (!before) area.parentElement?.append(note);
}
