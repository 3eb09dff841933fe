// Dialogs: the browser's own, so that focus, Escape and screen readers work by themselves.
import { el, ownKeys } from "./dom.js";
import { t } from "./text.js";

/** The event of a button that wants missing deltas repaired. */
export const REPAIR = "sepme:repair";

/** A button that opens the dialog of what is missing. */
export const repairButton = () => el("button.sepme-small", { type: "button", onclick: () => document.dispatchEvent(new Event(REPAIR)) }, t("card.repair"));

/** Show a dialog; returns it. `actions`: `[label, call]`, the last one is the main one; a dialog closes after each. */
export function openDialog(title, content, actions = []) {
  const heading = el("h2", {}, title);
  const dialog = ownKeys(el("dialog.sepme.sepme-dialog", { "aria-label": title, tabIndex: -1 }, heading, content));
  const buttons = [[t("dialog.close"), () => {}], ...actions].map(([label, call], i) =>
    el(i && i === actions.length ? "button.sepme-button.sepme-main" : "button.sepme-button", { type: "button", onclick: () => (dialog.close(), call()) }, label),
  );
  dialog.append(el("div.sepme-actions", {}, ...buttons));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  return dialog;
}

/** Ask; resolves to whether the user said yes. */
export function confirm(title, text, yes) {
  return new Promise((resolve) => {
    const dialog = openDialog(title, el("p", {}, text), [[yes, () => resolve(true)]]);
    dialog.addEventListener("close", () => resolve(false));
  });
}

/** Ask for a line of text; resolves to it, or to null. */
export function ask(title, label, value) {
  return new Promise((resolve) => {
    const input = el("input.sepme-text", { type: "text", value });
    const dialog = openDialog(title, el("label", {}, label, input), [[t("dialog.ok"), () => resolve(input.value.trim())]]);
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault(); // or it would press the button that gets the focus back
      dialog.querySelector(".sepme-main").click();
    });
    dialog.addEventListener("close", () => resolve(null));
    input.focus();
    input.select();
  });
}
