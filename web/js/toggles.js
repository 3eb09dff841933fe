// The value of a toggle panel: strengths by concept in the user's order, written as one JSON object.

/** What a name is compared by; case and spaces do not count. */
export const key = (name) => String(name).toLowerCase().split(/\s+/).filter(Boolean).join(" ");

/** Whether two names mean one concept. */
export const same = (a, b) => key(a) === key(b);

/** The deltas that a name means, as the server reads it: a concept, a label `name [hash]`, a file or a hash, the first of these that any has. */
export function meant(name, deltas) {
  const text = key(name);
  const [, concept, digest] = /^(.+) \[([0-9a-f]{6,64})\]$/.exec(text) ?? [];
  const stem = (file) => `/${key(file).replaceAll("\\", "/").replace(/\.safetensors$/, "")}`;
  const kinds = [
    (d) => key(d.concept) === text,
    (d) => key(d.concept) === concept && d.content_hash?.startsWith(digest),
    (d) => d.name && stem(d.name).endsWith(stem(name)),
    (d) => /^[0-9a-f]{6,64}$/.test(text) && d.content_hash?.startsWith(text),
  ];
  return kinds.map((fits) => deltas.filter(fits)).find((found) => found.length) ?? [];
}

/** Names of a list that somebody typed: by commas or lines, one that holds such a sign in double quotes, its own doubled. */
export const splitNames = (text) =>
  [...String(text).matchAll(/\s*(?:"((?:[^"]|"")*)"|“([^“”]*)”)\s*(?:[,\n]|$)|([^,\n]*)(?:[,\n]|$)/g)]
    .map(([, quoted, curly, plain]) => (quoted?.replaceAll('""', '"') ?? curly ?? plain).trim())
    .filter(Boolean);

/** A name as such a list takes it. */
export const quoteName = (name) => (/[,\n"“]/.test(name) ? `"${name.replaceAll('"', '""')}"` : name);

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
  const listed = new Set();
  const result = entries.map(([name, strength]) => {
    const delta = meant(name, concepts)[0] ?? meant(name, earlier)[0];
    listed.add(key(delta?.concept ?? name));
    return { name, strength, known: !!delta, delta };
  });
  for (const delta of new Map(concepts.map((c) => [key(c.concept), c])).values()) {
    if (!listed.has(key(delta.concept))) result.push({ name: delta.concept, strength: undefined, known: true, delta });
  }
  return result;
}
