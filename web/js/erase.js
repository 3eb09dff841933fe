// The panel of SepME Erase: rows that are typed or chosen, each a switch.
import { openDialog, repairButton } from "./dialog.js";
import { el } from "./dom.js";
import { library } from "./library.js";
import { said, sentences, typed, words } from "./nearby.js";
import { TogglePanel } from "./panel.js";
import { t } from "./text.js";
import { quoteName, same, splitNames } from "./toggles.js";

const FOOT = 34; // pixels of the line that adds rows
const FOUND = 20; // of a sentence about nearby words
const MOST = 40; // choices shown at once

/** The rows of a value: what the server's parse_rows reads; null when it can be read as none. */
export function parseRows(text) {
  const plain = String(text ?? "").trim();
  if (!/^[[{]/.test(plain)) return splitNames(plain).map((name) => ({ name }));
  try {
    const rows = JSON.parse(plain);
    return Array.isArray(rows) && rows.every((row) => typeof row?.name === "string") ? rows : null;
  } catch {
    return null;
  }
}

/** What a row does: its strength, 0 where it is switched off. */
export const acting = (row) => (row.on === false ? 0 : row.strength ?? 1);

/** What the rows of a value erase, as facts of deltas: saved ones as the library has them, others as far as they are known. */
export function erased(text, made = []) {
  return (parseRows(text) ?? []).filter((row) => row.name.trim()).map((row) => {
    if (row.file || row.content_hash) return library.find(row.file ?? "", row.content_hash ?? "") ?? { concept: row.name, name: row.file ?? "", content_hash: row.content_hash ?? "", missing: true };
    return made.find((d) => same(d.concept, row.name)) ?? { concept: row.name, untrained: true };
  });
}

export class ErasePanel extends TogglePanel {
  /** @param {(text: string) => void} onChange called with the new value after the user changed it */
  constructor(onChange) {
    super(false, onChange);
    this.text = "[]";
    this.made = []; // facts of what the server made of the rows
    this.preserve = null; // the node's own words that must stay, as {get, set}
    this.field = el("input.sepme-search", {
      type: "text", placeholder: t("erase.placeholder"), "aria-label": t("erase.placeholder"), autocomplete: "off", role: "combobox", "aria-expanded": "false",
      oninput: () => this.offer(), onfocus: () => this.offer(), onclick: () => this.menu || this.offer(), onblur: () => setTimeout(() => this.closeChoices(), 150), onkeydown: (event) => this.onTyped(event),
    });
    const add = el("button.sepme-small.sepme-add", { type: "button", onclick: () => (this.field.value.trim() ? this.addTyped() : this.field.focus()) }, t("erase.add"));
    this.element.classList.add("sepme-erase");
    this.found = el("div.sepme-found", { role: "status", hidden: true });
    this.element.append(this.found, el("div.sepme-foot", {}, this.field, add));
    this.draw();
  }

  get height() {
    const lines = this.found?.children.length ?? 0;
    return super.height + FOOT + (lines ? FOUND * lines + 4 : 0);
  }

  draw() {
    super.draw();
    if (!this.found) return; // while the panel is made
    const lines = sentences(this.rows).map(({ grade, text, row }) => {
      const parts = [el(`span.sepme-dot.sepme-${grade}`), el("span.sepme-name", {}, text)];
      if (!row || row.entry.file || row.entry.content_hash) return el("div.sepme-sentence", { title: text }, ...parts);
      return el("button.sepme-sentence", { type: "button", title: `${text}\n${t("erase.changeWords")}`, onclick: () => this.ask(row) }, ...parts);
    });
    this.found.replaceChildren(...lines);
    this.found.hidden = !lines.length;
  }

  read() {
    const rows = parseRows(this.text);
    return rows && rows.map((row, i) => {
      const delta = erased(JSON.stringify([row]), this.made)[0] ?? { untrained: true };
      return { name: row.name || `#${i + 1}`, strength: acting(row), known: true, delta, entry: row };
    });
  }

  write(rows) {
    const entries = rows.map(({ entry, strength, name }) => {
      const { on, strength: _, ...rest } = entry;
      const kept = strength || this.remembered.get(name) || entry.strength || 1;
      return { ...rest, ...(kept === 1 ? {} : { strength: kept }), ...(strength ? {} : { on: false }) };
    });
    return JSON.stringify(entries);
  }

  get emptyKey() {
    return "erase.empty";
  }

  drawRow(row) {
    const element = super.drawRow(row);
    const part = this.byName.get(row.name);
    part.drop.title = t("panel.remove");
    part.drop.setAttribute("aria-label", `${part.drop.title}: ${row.name}`);
    if (row.delta.missing) {
      this.inCell(part, repairButton());
      return element;
    }
    if (row.entry.file || row.entry.content_hash) return element;
    const anchor = row.entry.anchor ?? row.delta.anchor;
    const shown = anchor ?? t("erase.automatic");
    const stays = row.delta.preserve?.length ? `\n${t("erase.stays", { words: row.delta.preserve.join(", ") })}` : "";
    const change = el("button.sepme-anchor", { type: "button", title: `${t("erase.becomes", { anchor: shown || t("erase.nothing") })}${stays}\n${t("erase.change")}`, onclick: () => this.ask(row) }, anchor == null ? "→ …" : `→ ${anchor || t("erase.nothing")}`);
    this.inCell(part, change);
    return element;
  }

  /** Put something behind a row's name. */
  inCell(part, what) {
    const cell = el("span.sepme-cell");
    part.name.replaceWith(cell);
    cell.append(part.name, what);
  }

  update(row) {
    super.update(row);
    this.byName.get(row.name).drop.hidden = false;
  }

  /** Ask what takes a concept's place: found by itself, nothing in particular, or the user's own words; what must stay; what changes along. */
  ask(row) {
    const own = el("input.sepme-text", { type: "text", value: row.entry.anchor ?? row.delta.anchor ?? "", "aria-label": t("erase.own"), oninput: () => (radios[2].checked = true) });
    const kind = row.entry.anchor == null ? 0 : row.entry.anchor ? 2 : 1;
    const radios = ["erase.byItself", "erase.nothing", "erase.own"].map((key, i) => el("input", { type: "radio", name: "sepme-anchor", value: key, checked: i === kind }));
    const choices = radios.map((radio) => el("label.sepme-choice", {}, radio, t(radio.value)));
    const stays = row.delta.preserve?.length ? el("p", {}, t("erase.stays", { words: row.delta.preserve.join(", ") })) : null;
    const list = this.preserve && el("textarea.sepme-text.sepme-stay", { rows: 3, value: this.preserve.get() });
    const must = list && el("label", {}, t("erase.mustStay"), list);
    const near = words(row.entry, row.delta);
    const placeholder = row.delta.near ? "" : t("erase.atFirstRun");
    const [stay, alike] = [["near", 3, near.stay], ["same", 1, near.same]].map(([name, rows, shown]) => el(`textarea.sepme-text.sepme-${name}`, { rows, placeholder, value: shown.map(quoteName).join(", ") }));
    const nearby = [el("label", {}, t("erase.near"), stay), el("label", {}, t("erase.same"), alike)];
    const dialog = openDialog(t("erase.anchorTitle", row), el("div.sepme-options", {}, ...choices, own, el("p", {}, t("erase.anchorLabel")), stays, ...nearby, must), [[t("dialog.ok"), () => {
      if (list && list.value !== this.preserve.get()) this.preserve.set(list.value);
      const { anchor: _, ...rest } = said(row.entry, row.delta, typed(stay.value), typed(alike.value));
      const chosen = radios.findIndex((radio) => radio.checked);
      const text = own.value.trim();
      this.replace(row, chosen === 1 ? { ...rest, anchor: "" } : chosen === 2 && text ? { ...rest, anchor: text } : rest);
    }]]);
    own.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // or it would press the button that gets the focus back
      dialog.querySelector(".sepme-main").click();
    });
  }

  /** Let a row say something else. */
  replace(row, entry) {
    if (JSON.stringify(entry) === JSON.stringify(row.entry)) return;
    row.entry = entry;
    this.commit();
    this.draw();
  }

  /** Let the row of a concept mean this saved delta, or, without one, its name alone. */
  point(concept, facts) {
    const row = this.rows.find((r) => same(r.name, concept));
    if (!row) return;
    const { file: _, content_hash: __, ...rest } = row.entry;
    this.replace(row, facts ? { ...rest, file: facts.name, content_hash: facts.content_hash } : rest);
  }

  forget(row) {
    this.rows.splice(this.rows.indexOf(row), 1);
    this.commit();
    this.draw();
  }

  /** Add rows; those whose concept is there already are left out. */
  add(rows) {
    const fresh = rows.filter((row) => !this.rows.some((r) => same(r.name, row.name)));
    if (!fresh.length) return;
    this.text = this.write([...this.rows, ...fresh.map((entry) => ({ name: entry.name, strength: acting(entry), entry }))]);
    this.draw();
    this.onChange(this.text);
  }

  addTyped() {
    const names = splitNames(this.field.value);
    this.field.value = "";
    this.add(names.map((name) => library.presets.flatMap((p) => p.concepts).find((c) => same(c.name, name)) ?? { name }));
    this.closeChoices();
  }

  /** What can be chosen for the words that are typed: presets, their examples, saved deltas. */
  choices() {
    const words = this.field.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    const fits = (...texts) => words.every((word) => texts.join(" ").toLowerCase().includes(word));
    const found = [];
    for (const d of library.deltas) if (fits(d.concept, d.name)) found.push({ label: d.concept, tag: t("erase.saved"), rows: [{ name: d.concept, file: d.name, content_hash: d.content_hash }] });
    for (const p of library.presets) {
      if (p.whole && fits(p.title)) found.push({ label: p.title, tag: t("erase.whole", { count: p.concepts.reduce((n, c) => n + (c.prompts?.length ?? 0), 0) }), rows: p.concepts });
    }
    for (const p of library.presets.filter((p) => !p.whole)) for (const c of p.concepts) if (fits(p.title, c.name)) found.push({ label: c.name, tag: p.title, rows: [c] });
    return found.filter((c) => c.rows.some((row) => !this.rows.some((r) => same(r.name, row.name)))).slice(0, MOST);
  }

  offer() {
    this.closeChoices();
    const choices = this.choices();
    if (!choices.length) return;
    const box = this.field.getBoundingClientRect();
    this.menu = el("ul.sepme.sepme-completion.sepme-choices", { role: "listbox", "aria-label": t("erase.choices") });
    for (const { label, tag, rows } of choices) {
      const item = el("li", { role: "option", "aria-selected": "false" }, el("b", {}, label), el("span.sepme-tag", {}, tag));
      item.onmousedown = (event) => (event.preventDefault(), item.take());
      item.take = () => ((this.field.value = ""), this.add(rows), this.offer());
      this.menu.append(item);
    }
    const below = window.innerHeight - box.bottom > 200;
    Object.assign(this.menu.style, { left: `${box.left}px`, minWidth: `${box.width}px`, ...(below ? { top: `${box.bottom}px` } : { bottom: `${window.innerHeight - box.top}px` }) });
    this.field.setAttribute("aria-expanded", "true");
    document.body.append(this.menu);
  }

  closeChoices() {
    this.menu?.remove();
    this.menu = null;
    this.field.setAttribute("aria-expanded", "false");
  }

  onTyped(event) {
    const items = [...(this.menu?.children ?? [])];
    const at = items.findIndex((item) => item.getAttribute("aria-selected") === "true");
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && items.length) {
      const next = at < 0 && step < 0 ? items.length - 1 : (at + step + items.length) % items.length;
      for (const [i, item] of items.entries()) item.setAttribute("aria-selected", String(i === next));
      items[next].scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter") {
      if (at >= 0) items[at].take();
      else this.addTyped();
    } else if (event.key === "Escape") this.closeChoices();
    else return;
    event.preventDefault();
  }
}
