// The value of a toggle panel: strengths by concept in the user's order, written as one JSON object.

/** What a name is compared by; case and spaces do not count. */
export const key = (name) => String(name).toLowerCase().split(/\s+/).filter(Boolean).join(" ");

/** Whether two names mean one concept. */
export const same = (a, b) => key(a) === key(b);

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
  const byName = new Map(concepts.map((c) => [key(c.concept), c]));
  const others = new Map(earlier.map((c) => [key(c.concept), c]));
  const listed = new Set();
  const result = entries.map(([name, strength]) => {
    const id = key(name);
    listed.add(id);
    return { name, strength, known: byName.has(id) || others.has(id), delta: byName.get(id) ?? others.get(id) };
  });
  for (const [id, delta] of byName) {
    if (!listed.has(id)) result.push({ name: delta.concept, strength: undefined, known: true, delta });
  }
  return result;
}
