// The value of a toggle panel: strengths by concept in the user's order, written as one JSON object.

const normalised = (name) => String(name).toLowerCase().split(/\s+/).filter(Boolean).join(" ");

/** Whether two names mean one concept; case and spaces do not count. */
export const same = (a, b) => normalised(a) === normalised(b);

/** The entries `[name, strength]` of a JSON text; null when it is no object of numbers. */
export function parse(text) {
  if (!String(text ?? "").trim()) return [];
  try {
    const data = JSON.parse(text);
    if (data === null || typeof data !== "object" || Array.isArray(data)) return null;
    const entries = Object.entries(data).map(([name, value]) => [name, Number(value)]);
    return entries.every(([, value]) => Number.isFinite(value)) ? entries : null;
  } catch {
    return null;
  }
}

/** The JSON text of entries, in their order (an object would put names made of digits first). */
export const write = (entries) => `{${entries.map(([name, value]) => `${JSON.stringify(name)}: ${value}`).join(", ")}}`;

/**
 * The rows of a panel: what its value names, in its order, then the other concepts that are connected.
 * A row without a strength follows the default. `known`: a delta of this concept is connected, here or further up (`earlier`).
 */
export function rows(entries, concepts, earlier = []) {
  const byName = new Map(concepts.map((c) => [normalised(c.concept), c]));
  const others = new Map(earlier.map((c) => [normalised(c.concept), c]));
  const listed = new Set();
  const result = entries.map(([name, strength]) => {
    const key = normalised(name);
    listed.add(key);
    return { name, strength, known: byName.has(key) || others.has(key), delta: byName.get(key) ?? others.get(key) };
  });
  for (const [key, delta] of byName) {
    if (!listed.has(key)) result.push({ name: delta.concept, strength: undefined, known: true, delta });
  }
  return result;
}
