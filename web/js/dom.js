// Elements in one call.

/** `el("button.sepme-x", {onclick, title, "aria-label": …}, "text", child, …)`; null children are left out. */
export function el(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const element = document.createElement(tag);
  element.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null) continue;
    if (name in element && !name.startsWith("aria-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Keys typed inside must not reach the host's shortcuts; undo and the like still do. */
export function ownKeys(element) {
  for (const kind of ["keydown", "keyup", "keypress"]) {
    element.addEventListener(kind, (event) => {
      if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
    });
  }
  return element;
}

/** The pack's style sheet. */
export function loadStyle() {
  document.head.append(el("link", { rel: "stylesheet", href: new URL("./sepme.css", import.meta.url).href }));
}

/** A size in words. */
export const bytes = (n) => (n < 1e6 ? `${Math.round(n / 1e3)} kB` : `${(n / 1e6).toFixed(1)} MB`);

/** A figure with as many digits as it needs. */
export const figure = (x) => (x == null ? "–" : x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3));
