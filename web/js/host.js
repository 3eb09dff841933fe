// All that the page needs of ComfyUI's front end, in one place.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

export { api, app };

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

export function toast(severity, summary, detail) {
  app.extensionManager?.toast?.add({ severity, summary, detail, life: severity === "error" ? 12000 : 5000 });
}
