// The toggle panel: one row per concept, drawn once and then changed in place.
import { bytes, el, figure, ownKeys } from "./dom.js";
import { parse, rows, same, write } from "./toggles.js";
import { t } from "./text.js";
import { verdict } from "./verdict.js";

const SEARCH_FROM = 9; // rows from which on there is a search field
const ROW = 28; // pixels of a row
const HEAD = 36; // of the panel without rows

/**
 * @param {boolean} inherits rows without a strength follow SepMEApply (nodes of one prompt); otherwise they are erased
 * @param {(text: string) => void} onChange called with the new value after the user changed it
 */
export class TogglePanel {
  constructor(inherits, onChange) {
    this.inherits = inherits;
    this.onChange = onChange;
    this.text = "{}";
    this.concepts = [];
    this.earlier = [];
    this.hidden = false;
    this.notes = [];
    this.remembered = new Map(); // strength before a row was switched off
    this.byName = new Map();
    this.list = el("div.sepme-rows", { role: "list", "data-capture-wheel": "true" });
    this.search = el("input.sepme-search", { type: "search", placeholder: t("panel.search"), "aria-label": t("panel.search"), oninput: () => this.filter() });
    this.count = el("span.sepme-count", { role: "status", "aria-live": "polite" });
    this.note = el("div.sepme-note", { role: "alert", hidden: true });
    const button = (key, change) =>
      el("button.sepme-small", { type: "button", title: t(`panel.${key}Tip`), onclick: () => this.changeAll(change) }, t(`panel.${key}`));
    this.head = el(
      "div.sepme-head",
      {},
      this.count,
      button("all", () => 1),
      button("none", () => 0),
      inherits ? button("clear", () => undefined) : button("invert", (row) => (this.strength(row) ? 0 : this.remembered.get(row.name) ?? 1)),
    );
    this.element = ownKeys(el("div.sepme.sepme-panel", { role: "group", "aria-label": t("panel.label") }, this.head, this.search, this.note, this.list));
    this.list.addEventListener("keydown", (event) => this.onKey(event));
    this.draw();
  }

  get value() {
    return this.text;
  }

  set value(text) {
    const next = typeof text === "string" ? text : text == null ? "{}" : JSON.stringify(text);
    if (next === this.text) return;
    this.text = next;
    this.draw();
  }

  /** Height that shows up to eight rows. */
  get height() {
    const note = this.note.hidden ? 0 : (this.note.offsetHeight || 20 * this.note.children.length + 6) + 4;
    return HEAD + (this.search.hidden ? 0 : 30) + note + ROW * Math.min(Math.max(this.rows.length, 1), 8);
  }

  /**
   * Facts of the deltas that are connected, and sentences about what is wrong with them. What a prompt node does without toggles of
   * its own is in each delta's `inherited`, what its text's tags say in `tagged`. `hidden`: more are connected that cannot be seen.
   */
  show(concepts, notes = [], earlier = [], hidden = false) {
    const next = JSON.stringify([concepts, notes, earlier, hidden]);
    if (next === this.shown) return;
    this.shown = next;
    this.concepts = concepts;
    this.notes = notes;
    this.earlier = earlier;
    this.hidden = hidden;
    this.draw();
  }

  /** What a row does; undefined where its prompt is drawn by models that differ. */
  strength(row) {
    return row.delta?.tagged ?? row.strength ?? (this.inherits ? row.delta?.inherited : 1);
  }

  /** The rows that the value means; null when it cannot be read. */
  read() {
    const entries = parse(this.text);
    return entries && rows(entries, this.concepts, this.earlier);
  }

  /** The value of rows: all of them, so that their order stays; where rows inherit, those that were set. */
  write(shown) {
    const set = shown.filter((row) => !this.inherits || row.strength !== undefined);
    return write(set.map((row) => [row.name, row.strength ?? 1]));
  }

  get emptyKey() {
    return this.hidden ? "panel.hidden" : this.inherits ? "panel.emptyPrompt" : "panel.empty";
  }

  draw() {
    const entries = this.read();
    const focused = this.rows?.find((row) => this.byName.get(row.name).row.contains(document.activeElement))?.name;
    this.rows = entries ?? [];
    this.byName = new Map();
    this.list.replaceChildren(...this.rows.map((row) => this.drawRow(row)));
    if (!this.rows.length) this.list.append(el("div.sepme-empty", {}, t(this.emptyKey)));
    const notes = entries === null ? [t("panel.broken")] : this.notes;
    this.note.hidden = !notes.length;
    this.note.replaceChildren(...notes.map((text) => el("div", {}, text)));
    if (entries === null) this.note.append(el("button.sepme-small", { type: "button", onclick: () => this.reset() }, t("panel.reset")));
    this.search.hidden = this.rows.length < SEARCH_FROM;
    if (this.search.hidden) this.search.value = "";
    this.filter();
    this.countRows();
    if (focused) this.focus(focused); // a keyboard's place survives what is drawn anew
  }

  drawRow(row) {
    const part = {
      dot: el("span.sepme-dot", { role: "img" }),
      toggle: el("button.sepme-switch", { type: "button", role: "switch", onclick: () => this.toggle(row) }),
      name: el("span.sepme-name", {}, row.name),
      slider: el("input.sepme-slider", { type: "range", min: 0, max: 1, step: 0.05, "aria-label": t("panel.strengthOf", row) }),
      number: el("input.sepme-number", { type: "number", min: -100, max: 100, step: 0.05, "aria-label": t("panel.strengthOf", row) }),
      drop: el("button.sepme-small.sepme-drop", { type: "button", onclick: () => this.forget(row) }, "×"),
    };
    part.slider.oninput = () => this.set(row, Number(part.slider.value), false);
    part.slider.onchange = () => this.set(row, Number(part.slider.value));
    part.number.onchange = () => this.set(row, Math.min(100, Math.max(-100, Number(part.number.value) || 0)));
    part.drop.title = t(row.known ? "panel.inherit" : "panel.remove");
    part.drop.setAttribute("aria-label", `${part.drop.title}: ${row.name}`);
    part.grip = this.inherits ? el("span") : el("span.sepme-grip", { title: t("panel.move") }, "⠿");
    part.grip.onpointerdown = (event) => this.drag(event, row);
    const { grade, tip } = this.certificate(row);
    part.dot.classList.add(`sepme-${grade}`);
    part.dot.setAttribute("aria-label", tip);
    part.dot.title = tip;
    part.name.title = row.known ? row.name : tip;
    part.row = el("div.sepme-row", { role: "listitem" }, part.grip, part.dot, part.toggle, part.name, part.slider, part.number, part.drop);
    this.byName.set(row.name, part);
    this.update(row);
    return part.row;
  }

  /** The certificate of a row in a colour and in words. */
  certificate({ known, delta, name }) {
    if (!known) return { grade: "lost", tip: t("panel.unknown", { name }) };
    if (delta.missing) return { grade: "lost", tip: t("panel.missing", { name }) };
    if (delta.mismatch) return { grade: "lost", tip: delta.mismatch };
    if (delta.untrained) return { grade: "unknown", tip: t("panel.untrained") };
    const figures = { leakage: figure(delta.leakage), gated: figure(delta.leakage_gated), low: figure(delta.gate_low), gate: figure(delta.gate), high: figure(delta.gate_high), touched: ((delta.false_touch_rate ?? 0) * 100).toFixed(1), size: bytes(delta.bytes ?? 0) };
    return { grade: delta.grade, tip: `${verdict(delta)}\n${t("panel.figures", figures)}` };
  }

  update(row) {
    const part = this.byName.get(row.name);
    const strength = this.strength(row);
    const lost = !row.known;
    const tagged = row.delta?.tagged !== undefined;
    const inherited = this.inherits && !tagged && row.strength === undefined;
    part.row.classList.toggle("sepme-off", !strength);
    part.row.classList.toggle("sepme-unlisted", lost);
    part.row.classList.toggle("sepme-inherited", inherited);
    part.toggle.setAttribute("aria-checked", strength === undefined ? "mixed" : String(strength !== 0));
    part.toggle.setAttribute("aria-label", t("panel.erase", row));
    const acts = strength === undefined ? "panel.differs" : strength ? "panel.on" : "panel.off";
    part.toggle.title = tagged ? t("panel.tagged") : inherited ? `${t("panel.inherit")}. ${t(acts)}` : t(acts);
    for (const control of [part.toggle, part.slider, part.number]) control.disabled = tagged;
    const shown = strength ?? 1;
    if (Number(part.slider.value) !== shown) part.slider.value = shown;
    part.slider.style.setProperty("--sepme-at", `${Math.max(0, Math.min(1, shown)) * 100}%`);
    part.number.value = strength === undefined || inherited ? "" : Number(shown.toFixed(3));
    part.number.placeholder = strength === undefined ? "?" : Number(shown.toFixed(3));
    part.drop.hidden = !(lost || (this.inherits && row.strength !== undefined));
  }

  toggle(row) {
    const strength = this.strength(row) ?? 1;
    if (strength) this.remembered.set(row.name, strength);
    this.set(row, strength ? 0 : this.remembered.get(row.name) ?? 1);
  }

  /** Set a row's strength; while a slider is dragged nothing is committed. */
  set(row, strength, commit = true) {
    row.strength = strength;
    this.update(row);
    if (commit) this.commit();
  }

  changeAll(change) {
    for (const row of this.rows) {
      if (this.byName.get(row.name).row.hidden) continue; // search narrows what the buttons act on
      const strength = this.strength(row);
      if (strength) this.remembered.set(row.name, strength);
      row.strength = change(row);
      this.update(row);
    }
    this.commit();
  }

  forget(row) {
    row.strength = undefined;
    if (!row.known) {
      this.rows.splice(this.rows.indexOf(row), 1);
      this.byName.get(row.name).row.remove();
    } else {
      this.update(row);
    }
    this.commit();
  }

  /** The rows become the value. */
  commit() {
    this.text = this.write(this.rows);
    this.countRows();
    this.onChange(this.text);
  }

  /** Throw away a value that cannot be read. */
  reset() {
    this.rows = [];
    this.commit();
    this.draw();
  }

  countRows() {
    const on = this.rows.filter((row) => this.strength(row)).length;
    this.count.textContent = this.rows.length ? t("panel.count", { on, of: this.rows.length }) : "";
  }

  filter() {
    const wanted = this.search.value.trim().toLowerCase();
    for (const row of this.rows) this.byName.get(row.name).row.hidden = !row.name.toLowerCase().includes(wanted);
  }

  move(row, to) {
    const from = this.rows.indexOf(row);
    const end = Math.max(0, Math.min(this.rows.length - 1, to));
    if (this.inherits || end === from) return false;
    this.rows.splice(from, 1);
    this.rows.splice(end, 0, row);
    const element = this.byName.get(row.name).row;
    const before = this.list.children[end + (end > from ? 1 : 0)];
    this.list.insertBefore(element, before ?? null);
    return true;
  }

  drag(event, row) {
    if (this.inherits) return;
    event.preventDefault();
    event.stopPropagation();
    let moved = false;
    const follow = ({ clientY }) => {
      const at = this.rows.findIndex((r) => {
        const box = this.byName.get(r.name).row.getBoundingClientRect();
        return clientY >= box.top && clientY < box.bottom;
      });
      if (at >= 0) moved = this.move(row, at) || moved;
    };
    const kinds = ["pointerup", "pointercancel"];
    const end = () => {
      window.removeEventListener("pointermove", follow, true);
      for (const kind of kinds) window.removeEventListener(kind, end, true);
      if (moved) this.commit();
    };
    window.addEventListener("pointermove", follow, true); // a row that moves in the list would lose a captured pointer
    for (const kind of kinds) window.addEventListener(kind, end, true);
  }

  /** Up and down go from switch to switch, Alt moves the row, Home and End go to the ends. */
  onKey(event) {
    const row = this.rows.find((r) => this.byName.get(r.name).row.contains(event.target));
    if (!row || event.target.type === "number" || event.target.type === "range") return;
    const shown = this.rows.filter((r) => !this.byName.get(r.name).row.hidden);
    const step = { ArrowUp: -1, ArrowDown: 1, Home: -shown.length, End: shown.length }[event.key];
    if (!step) return;
    event.preventDefault();
    if (event.altKey) {
      if (this.move(row, this.rows.indexOf(row) + step)) this.commit();
      this.byName.get(row.name).toggle.focus();
      return;
    }
    const at = Math.max(0, Math.min(shown.length - 1, shown.indexOf(row) + step));
    this.byName.get(shown[at].name).toggle.focus();
  }

  focus(name) {
    this.byName.get(this.rows.find((r) => same(r.name, name))?.name)?.toggle.focus();
  }
}
