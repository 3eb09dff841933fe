// Words in the user's language, from the pack's locales/<language>/main.json as the server hands them out.
import { api, app } from "./host.js";

let english = {};
let own = {};

export async function loadText() {
  const all = await (await api.fetchApi("/i18n")).json();
  english = all.en?.sepme ?? {};
  own = all[app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"]?.sepme ?? {};
}

/** The text of a key, `{name}` replaced by `values.name`; the key itself where there is none. */
export function t(key, values = {}) {
  const text = own[key] ?? english[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (all, name) => values[name] ?? all);
}
