// The pictures of SepME Compare: without and with the erasure, one over the other, with a slider between them.
import { api, grow, nodes, rootGraph } from "./host.js";
import { el, ownKeys } from "./dom.js";
import { t } from "./text.js";

const MARGIN = 6;
const HEIGHT = 280;

/** What was drawn in this tab, by workflow and node: undo and other workflows make the nodes anew. */
const known = new Map();

const place = (node) => `${rootGraph().id} ${node.graph.id} ${node.id}`;

/** Give a comparing node its display. */
export function comparingNode(node) {
  if (node.comfyClass !== "SepMECompare") return;
  const [before, after] = ["before", "after"].map((name) => el(`img.sepme-${name}`, { alt: t(`compare.${name}`), draggable: false }));
  const slider = el("input.sepme-divider", { type: "range", min: 0, max: 100, step: 0.5, value: 50, "aria-label": t("compare.slider"), oninput: () => divide() });
  const stage = el("div.sepme-stage", { hidden: true }, before, after, el("span", {}, t("compare.before")), el("span", {}, t("compare.after")), slider);
  const state = el("div.sepme-empty", {}, t("compare.idle"));
  const next = el("button.sepme-small", { type: "button", hidden: true, onclick: () => draw(node.sepmeCompare.at + 1) });
  const element = ownKeys(el("div.sepme.sepme-compare", {}, state, stage, next));
  const divide = () => stage.style.setProperty("--sepme-at", `${slider.value}%`);
  divide();

  function draw(at) {
    const { before: stock, after: erased } = node.sepmeCompare.shown;
    node.sepmeCompare.at = at % stock.length;
    before.src = address(stock[node.sepmeCompare.at]);
    after.src = address(erased[node.sepmeCompare.at]);
    next.hidden = stock.length < 2;
    next.textContent = t("compare.next", { at: node.sepmeCompare.at + 1, of: stock.length });
    state.hidden = true;
    stage.hidden = false;
  }

  const made = node.addDOMWidget("sepme_compare", "SEPME_COMPARE", element, { serialize: false, getMinHeight: () => HEIGHT + 2 * MARGIN, hideOnZoom: false, margin: MARGIN });
  made.serialize = false;
  node.sepmeCompare = { element, at: 0, shown: null, show: (shown) => ((node.sepmeCompare.shown = shown), draw(0)) };
  const heard = node.onExecuted;
  node.onExecuted = function (output) {
    heard?.call(this, output);
    const shown = output?.sepme_compare?.[0];
    if (!shown) return;
    known.set(place(node), shown);
    node.sepmeCompare.show(shown);
  };
  grow(node);
}

/** After a workflow was loaded: the pictures that its nodes showed before. */
export function restoreComparing() {
  for (const node of nodes()) {
    const shown = node.sepmeCompare && known.get(place(node));
    if (shown) node.sepmeCompare.show(shown);
  }
}

const address = ({ filename, subfolder, type }) => api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
