// The deltas on the server, and what can be done with them.
import { api } from "./host.js";
import { told } from "./text.js";
import { same } from "./toggles.js";

class Library extends EventTarget {
  /** Facts of every delta in models/sepme, as GET /sepme/deltas has them. */
  deltas = [];
  /** Lists of concepts to choose from, as GET /sepme/presets has them. */
  presets = [];
  /** Whether the list has been read. */
  ready = false;

  asked = 0;

  /** Read the list; of several that are under way at once the last one asked for counts, whichever answer comes last. */
  load() {
    return (this.newest = this.read(++this.asked));
  }

  async read(turn) {
    if (!this.presets.length) this.presets = (await request("/sepme/presets")).presets;
    const { deltas } = await request("/sepme/deltas");
    if (turn !== this.asked) return this.newest;
    this.deltas = deltas;
    this.ready = true;
    this.dispatchEvent(new Event("change"));
  }

  /** The delta that a loader means, as the server finds it: with a hash only that one, wherever it lies; without, by name. */
  find(name, hash) {
    const plain = String(name).replaceAll("\\", "/");
    const equal = hash ? this.deltas.filter((d) => d.content_hash === hash) : this.deltas;
    const named = equal.find((d) => d.name === plain || d.copies?.includes(plain)); // files of one content are listed once
    return named ? { ...named, name: plain } : hash ? equal[0] : undefined;
  }

  ofConcept(concept) {
    return this.deltas.filter((d) => same(d.concept, concept));
  }

  /** Install a file. Throws an error with status 409 when another file has the name. */
  async install(name, content, replace = false) {
    const query = new URLSearchParams({ name, replace });
    const headers = { "Content-Type": "application/octet-stream" };
    const facts = await request(`/sepme/deltas?${query}`, { method: "POST", body: content, headers });
    await this.load();
    return facts;
  }

  async rename(from, to) {
    const facts = await post("/sepme/deltas/rename", { from, to });
    await this.load();
    return facts;
  }

  async remove(delta) {
    const query = new URLSearchParams({ name: delta.name, content_hash: delta.content_hash });
    await request(`/sepme/deltas?${query}`, { method: "DELETE" });
    await this.load();
  }

  /** What a workflow keeps of a delta: `{hash: record}`, the file itself included if asked. */
  record(name, embed = false) {
    return request(`/sepme/deltas/record?${new URLSearchParams({ name, embed })}`);
  }

  /** Address of a delta's small picture. */
  thumbnail(delta) {
    return api.apiURL(`/sepme/deltas/thumbnail?${new URLSearchParams({ name: delta.name, content_hash: delta.content_hash })}`);
  }

  book(text) {
    return post("/sepme/book", { book: text });
  }

  /** Of a checkpoint, `{architecture, fits}`: its own, and those of the deltas that fit it. */
  architecture(checkpoint) {
    return request(`/sepme/architecture?${new URLSearchParams({ checkpoint })}`);
  }
}

async function request(path, options) {
  const answer = await api.fetchApi(path, options);
  const data = await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }));
  if (!answer.ok) throw Object.assign(new Error(told(data.error ?? answer.statusText)), { status: answer.status });
  return data;
}

const post = (path, data) =>
  request(path, { method: "POST", body: JSON.stringify(data), headers: { "Content-Type": "application/json" } });

export const library = new Library();
