// Words in the user's language, from the pack's locales/<language>/main.json as the server hands them out.
import { api, app } from "./host.js";

let english = {};
let own = {};
let nodeWords = {};
let sentences = [];

export async function loadText() {
  const all = await (await api.fetchApi("/i18n")).json();
  english = all.en?.sepme ?? {};
  const chosen = all[app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"];
  own = chosen?.sepme ?? {};
  nodeWords = chosen?.nodeDefs ?? {};
  sentences = Object.entries(chosen?.sepmeServer ?? {}).map(([theirs, mine]) => [pattern(theirs), mine]);
}

/** Put a node's words into its definition: front end 1.32 loads its own languages late and forgets those of packs. */
export function translate(definition) {
  const words = definition.name.startsWith("SepME") && nodeWords[definition.name];
  if (!words) return;
  definition.display_name = words.display_name;
  definition.description = words.description;
  for (const specs of Object.values(definition.input ?? {})) {
    for (const [name, spec] of Object.entries(specs)) {
      const tooltip = words.inputs?.[name]?.tooltip;
      if (tooltip) spec[1] = { ...spec[1], tooltip };
    }
  }
}

/** The text of a key, `{name}` replaced by `values.name`; the key itself where there is none. */
export function t(key, values = {}) {
  const text = own[key] ?? english[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}

/** A pattern of an English sentence, `{}` being what differs. */
const pattern = (english) => new RegExp(`^${english.split("{}").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("([\\s\\S]*?)")}$`);

/** A sentence of the server in the user's language, as far as main.json has it: `{1}` there is the first `{}` of the English one. */
export function told(sentence) {
  for (const [theirs, mine] of sentences) {
    const match = theirs.exec(sentence);
    if (match) return mine.replace(/\{(\d)\}/g, (_, i) => match[i]);
  }
  return sentence;
}
