// Training as it runs: loss curve and current picture on the node; afterwards certificates and who disturbs whom.
import { api, grow, nodes, rootGraph, serverIds } from "./host.js";
import { el, figure } from "./dom.js";
import { refresh } from "./nodes.js";
import { t, told } from "./text.js";
import { spare, verdict } from "./verdict.js";

const SIZE = [300, 96];
const MARGIN = 6;
const STORE = "sepme.made";
const MOST = 64;

/** Give a training node its display. */
export function trainingNode(node) {
  if (node.comfyClass !== "SepMETrain") return;
  const canvas = el("canvas.sepme-curve", { width: 2 * SIZE[0], height: 2 * SIZE[1], role: "img", "aria-label": t("training.curve") });
  const picture = el("img.sepme-sample", { alt: t("training.sample"), hidden: true });
  const state = el("div.sepme-line", { role: "status" }, t("training.idle"));
  const result = el("div.sepme-result");
  const element = el("div.sepme.sepme-training", {}, state, el("div.sepme-live", { hidden: true }, canvas, picture), result);
  const made = node.addDOMWidget("sepme_training", "SEPME_TRAINING", element, { serialize: false, getMinHeight: () => Math.max(34, element.scrollHeight) + 2 * MARGIN, hideOnZoom: false, margin: MARGIN });
  made.serialize = false;
  node.sepmeTraining = { element, canvas, picture, state, result, losses: new Map() };
  grow(node);
  new ResizeObserver(() => grow(node)).observe(result); // it has a height only once it is on the screen
}

export function watchTraining() {
  api.addEventListener("sepme.train", ({ detail }) => {
    const node = find(detail.node);
    if (node?.sepmeTraining) step(node, detail);
  });
  api.addEventListener("executed", ({ detail }) => finished(detail?.node, detail?.output?.sepme_made));
  api.addEventListener("sepme.made", ({ detail }) => finished(detail.node, detail.sepme_made)); // of a training that does not run again
}

/** Whether a node makes deltas. */
const makes = (node) => node.sepmeTraining || node.comfyClass === "SepMEErase";

/** A node that makes deltas by the id that the server knows it by. */
const find = (id) => [...nodes()].find((n) => makes(n) && serverIds(n).includes(String(id)));

/** What was made in this tab, by workflow and node: undo, other workflows and a reload make the nodes anew, and a cached node tells nobody. */
const known = new Map(JSON.parse(sessionStorage.getItem(STORE) ?? "[]"));

const place = (id) => `${rootGraph().id} ${id}`;

/** After a workflow was loaded: what its nodes showed before. */
export function restoreTraining() {
  for (const node of nodes()) {
    const made = makes(node) && serverIds(node).map((id) => known.get(place(id))).find(Boolean);
    if (made) show(node, made);
  }
}

function step(node, { concept, step, steps, loss, sample, note }) {
  const { element, canvas, picture, state, result, losses } = node.sepmeTraining;
  element.querySelector(".sepme-live").hidden = false;
  if (step <= 1) {
    losses.clear();
    result.replaceChildren();
    picture.hidden = true;
  }
  if (!losses.has(concept)) losses.set(concept, []);
  if (loss != null) losses.get(concept).push(loss);
  state.textContent = note ? told(note) : t("training.step", { concept, step, steps, loss: figure(loss) });
  if (sample) {
    picture.src = sample;
    picture.hidden = false;
  }
  curve(canvas, losses.get(concept));
  grow(node);
}

/** The losses as a line; zero, where the concept is uncorrelated, is marked. */
function curve(canvas, losses) {
  const style = getComputedStyle(canvas);
  const pen = canvas.getContext("2d");
  const [width, height] = [canvas.width, canvas.height];
  pen.clearRect(0, 0, width, height);
  const low = Math.min(0, ...losses);
  const high = Math.max(0, ...losses) || 1;
  const y = (value) => 8 + ((high - value) / (high - low)) * (height - 16);
  const x = (i) => 8 + (i / Math.max(1, losses.length - 1)) * (width - 16);
  pen.lineWidth = 1;
  pen.strokeStyle = style.getPropertyValue("--border-color") || "#666";
  pen.beginPath();
  pen.moveTo(8, y(0));
  pen.lineTo(width - 8, y(0));
  pen.stroke();
  pen.lineWidth = 4;
  pen.strokeStyle = style.getPropertyValue("--sepme-accent");
  pen.beginPath();
  losses.forEach((value, i) => (i ? pen.lineTo(x(i), y(value)) : pen.moveTo(x(i), y(value))));
  pen.stroke();
}

function finished(id, made) {
  const node = made && find(id);
  if (!node) return;
  known.delete(place(id));
  known.set(place(id), made);
  if (known.size > MOST) known.delete(known.keys().next().value);
  try {
    sessionStorage.setItem(STORE, JSON.stringify([...known]));
  } catch {} // full: then only until the next reload
  show(node, made);
}

function show(node, made) {
  node.sepmeMade = made;
  if (!node.sepmeTraining) return refresh();
  const { state, result } = node.sepmeTraining;
  state.textContent = t("training.done", { count: made.length });
  result.replaceChildren(...made.map(certificate), ...sparing(node, made), ...(made.some((d) => Object.keys(d.leakage_by_name).length) ? [heatMap(made)] : []));
  grow(node);
  refresh();
}

function certificate(delta) {
  const text = t("training.certificate", { gated: figure(delta.leakage_gated), low: figure(delta.gate_low), gate: figure(delta.gate), high: figure(delta.gate_high) });
  return el("div.sepme-line", { title: verdict(delta) }, el(`span.sepme-dot.sepme-${delta.grade}`), el("b", {}, delta.concept), ` ${text}`);
}

/** A button that puts nearby words which change onto the preserve list, where there are such words. */
function sparing(node, made) {
  if (!made.some((d) => d.collateral?.count)) return [];
  const button = el("button.sepme-small", { type: "button", title: t("training.spareTip") }, t("training.spare"));
  button.onclick = () => {
    spare(node, made);
    button.disabled = true;
  };
  return [el("div.sepme-line", {}, button)];
}

/** What each delta (row) does to the prompts of the others (column), linear; a frame: it passes the gate. */
function heatMap(made) {
  const columns = [...new Set(made.flatMap((d) => Object.keys(d.leakage_by_name)))].slice(0, 24);
  const cell = (delta, name) => {
    const value = delta.leakage_by_name[name];
    if (value == null) return el("td");
    const td = el("td", { title: `${delta.concept} → ${name}: ${figure(value)}` });
    td.style.setProperty("--sepme-heat", Math.min(1, value).toFixed(3));
    if (value > delta.gate) td.classList.add("sepme-open");
    return td;
  };
  const head = el("tr", {}, el("th"), ...columns.map((name) => el("th", { title: name }, el("span", {}, name))));
  const body = made.map((delta) => el("tr", {}, el("th", { title: delta.concept }, delta.concept), ...columns.map((name) => cell(delta, name))));
  return el("table.sepme-heat", {}, el("caption", {}, t("training.heat")), head, ...body);
}
