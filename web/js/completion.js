// Completion of <erase:…> and <keep:…> in the prompts of nodes, in either renderer.
import { el } from "./dom.js";
import { library } from "./library.js";
import { nodeOf, takesTags } from "./tags.js";
import { t } from "./text.js";
import { deltasOfWorkflow, isOurs } from "./wires.js";

const OPEN = /<(?:(erase|keep):)?([^<>:]*)$/i;
const MOST = 8;

let box = null; // the list that is shown
let field = null; // the text area that it is for

export function watchPrompts() {
  document.addEventListener("input", ({ target }) => takesTags(nodeOf(target)) && suggest(target), true);
  document.addEventListener("keydown", onKey, true);
  document.addEventListener("focusout", ({ target }) => target === field && setTimeout(hide, 150), true);
}

async function suggest(target) {
  const match = OPEN.exec(target.value.slice(0, target.selectionStart));
  if (!match) return hide();
  const wanted = match[2].trimStart().toLowerCase();
  let choices;
  if (match[1]) {
    const names = new Set([...(await deltasOfWorkflow()), ...library.deltas].map((d) => d.concept));
    const found = [...names].filter((n) => !/[<>:]/.test(n) && n.toLowerCase().includes(wanted)); // others fit no tag
    found.sort((a, b) => b.toLowerCase().startsWith(wanted) - a.toLowerCase().startsWith(wanted));
    choices = found.map((name) => [name, `<${match[1].toLowerCase()}:${name}>`]);
  } else {
    const least = isOurs(nodeOf(target), "SepMETextEncode") ? 0 : 2; // elsewhere < and a letter begin other things too
    choices = ["erase", "keep"].filter((k) => wanted.length >= least && k.startsWith(wanted)).map((k) => [`${k}:`, `<${k}:`, t(`completion.${k}`)]);
  }
  if (!choices.length) return hide();
  show(target, match[0].length, choices.slice(0, MOST));
}

function show(target, length, choices) {
  hide();
  field = target;
  const at = caret(target);
  box = el("ul.sepme.sepme-completion", { role: "listbox", "aria-label": t("completion.label") });
  for (const [label, text, help] of choices) {
    const choice = el("li", { role: "option", "aria-selected": "false" }, el("b", {}, label), help ? ` ${help}` : "");
    choice.onmousedown = (event) => (event.preventDefault(), take(length, text));
    choice.take = () => take(length, text);
    box.append(choice);
  }
  box.style.left = `${at.left}px`;
  box.style.top = `${at.top}px`;
  document.body.append(box);
  select(0);
}

function hide() {
  box?.remove();
  box = field = null;
}

const selected = () => box?.querySelector("[aria-selected=true]");

function select(index) {
  const all = [...box.children];
  for (const [i, choice] of all.entries()) choice.setAttribute("aria-selected", String(i === (index + all.length) % all.length));
}

function onKey(event) {
  if (!box || event.target !== field) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) select([...box.children].indexOf(selected()) + step);
  else if (event.key === "Enter" || event.key === "Tab") selected().take();
  else if (event.key === "Escape") hide();
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
}

/** Put the text in the place of what was typed; the host hears of it as of typing. */
function take(length, text) {
  const target = field;
  hide();
  const end = target.selectionStart;
  target.setRangeText(text, end - length, end, "end");
  target.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Where the caret is on the page: measured on a copy of the text up to it. */
function caret(target) {
  const style = getComputedStyle(target);
  const box = target.getBoundingClientRect();
  const scale = box.width / target.offsetWidth || 1; // the canvas is zoomed by a transform
  const copy = el("div", { textContent: target.value.slice(0, target.selectionStart) });
  for (const name of ["font", "lineHeight", "letterSpacing", "padding", "borderWidth", "boxSizing"]) copy.style[name] = style[name];
  Object.assign(copy.style, { position: "absolute", visibility: "hidden", whiteSpace: "pre-wrap", overflowWrap: "break-word", width: `${target.offsetWidth}px` });
  const mark = el("span", {}, "\u200b");
  copy.append(mark);
  document.body.append(copy);
  const place = { left: box.left + mark.offsetLeft * scale, top: box.top + (mark.offsetTop + mark.offsetHeight - target.scrollTop) * scale };
  copy.remove();
  return place;
}
