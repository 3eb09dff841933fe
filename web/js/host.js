// All that the page needs of ComfyUI's front end, in one place.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export { api, app };

const TITLE = 40; // pixels above a node's body, with some air

/** The outermost graph; newer front ends call it rootGraph. */
export const rootGraph = () => app.rootGraph ?? app.graph;

/** Every graph of the workflow: the root and the subgraphs in it. */
export function* graphs() {
  const root = rootGraph();
  if (!root) return;
  yield root;
  yield* root.subgraphs?.values?.() ?? [];
}

/** Every node of the workflow, those in subgraphs included. */
export function* nodes() {
  for (const graph of graphs()) yield* graph.nodes ?? graph._nodes ?? [];
}

/** The ids that the server knows a node by: one for each use of the subgraph that it is in, `outer:inner`. */
export function serverIds(node) {
  if (node.graph === rootGraph()) return [String(node.id)];
  return [...nodes()].filter((n) => n.isSubgraphNode?.() && n.subgraph === node.graph).flatMap((n) => serverIds(n).map((id) => `${id}:${node.id}`));
}

export const widget = (node, name) => node.widgets?.find((w) => w.name === name);

/** Set a widget as if the user had; in Nodes 2.0 only the callback tells what is drawn. */
export function set(node, name, value) {
  const target = widget(node, name);
  if (!target || target.value === value) return;
  target.value = value;
  target.callback?.(value, app.canvas, node);
}

/** Put the change on the undo stack; the front end does so itself after mouse and keyboard, not after what a script changes. */
export function changed() {
  const tracker = app.extensionManager?.workflow?.activeWorkflow?.changeTracker;
  (tracker?.captureCanvasState ?? tracker?.checkState)?.call(tracker);
  rootGraph()?.setDirtyCanvas?.(true, true);
}

/** Let a node be at least as high as what is in it: the host does so when it loads a node, and a size that changes then is a step of undo. */
export function grow(node) {
  const height = node.computeSize()[1];
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** The nearest place below `[x, y]` where a box of this size lies on no node. */
export function freePlace(graph, [x, y], [width, height], but = []) {
  const others = graph.nodes.filter((n) => !but.includes(n));
  const hit = () => others.find((n) => x < n.pos[0] + n.size[0] && n.pos[0] < x + width && y - TITLE < n.pos[1] + n.size[1] && n.pos[1] - TITLE < y + height);
  for (let other = hit(); other; other = hit()) y = other.pos[1] + other.size[1] + TITLE + 20;
  return [x, y];
}

export function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: severity === "error" ? 12000 : 5000 });
}
