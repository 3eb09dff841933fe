// What is known of a delta's gate, in a sentence or two, and the words that it should spare.
import { t } from "./text.js";

/** The grade, then what nearby words and the concept's own prompts say. */
export function verdict({ grade, collateral, misses }) {
  const lines = [t(`grade.${grade}`)];
  if (grade === "unknown") return lines[0];
  if (!collateral || !misses) return [...lines, t("facts.nearbyUnmeasured")].join("\n");
  if (collateral.count) lines.push(t("facts.nearbyChange", { words: collateral.worst.join(", "), count: collateral.count, of: collateral.of }));
  else lines.push(t("facts.nearbyNone", { of: collateral.of }));
  if (misses.count) lines.push(t("facts.nearbyMissed", { count: misses.count, of: misses.of, example: misses.worst[0] }));
  return lines.join("\n");
}

/** Add the worst words of deltas to the preserve list of the node that made them; false where all of them stand there. */
export function spare(node, deltas) {
  const list = node.widgets?.find((w) => w.name === "preserve");
  const lines = (list?.value ?? "").split("\n").filter((line) => line.trim());
  const missing = [...new Set(deltas.flatMap((d) => d.collateral?.worst ?? []))].filter((word) => !lines.includes(word));
  if (!list || !missing.length) return false;
  list.value = [...lines, ...missing].join("\n");
  list.callback?.(list.value);
  return true;
}
