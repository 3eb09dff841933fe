// SepME's part of the page: one extension; everything else is in the modules beside this one.
import { api, app } from "./host.js";
import { comparingNode, restoreComparing } from "./compare.js";
import { watchPrompts } from "./completion.js";
import { loadStyle } from "./dom.js";
import { library } from "./library.js";
import { customWidgets, definePanel, nodeMade, refresh, watch } from "./nodes.js";
import { checkWorkflow } from "./repair.js";
import { registerSidebar } from "./sidebar.js";
import { loadText, translate } from "./text.js";
import { restoreTraining, trainingNode, watchTraining } from "./training.js";

loadStyle();

app.registerExtension({
  name: "SepME",
  getCustomWidgets: () => customWidgets,
  async init() {
    await loadText();
  },
  beforeRegisterNodeDef(_type, definition) {
    translate(definition);
    definePanel(definition);
  },
  nodeCreated(node) {
    trainingNode(node);
    comparingNode(node);
    nodeMade(node);
  },
  async setup() {
    registerSidebar();
    watch();
    watchTraining(api);
    watchPrompts();
    await library.load().catch((error) => console.error("SepME:", error.message));
    refresh();
  },
  async afterConfigureGraph() {
    await checkWorkflow().catch((error) => console.error("SepME:", error.message));
    restoreTraining();
    restoreComparing();
    refresh();
  },
});
