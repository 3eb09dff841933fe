// Files that the user drops or picks, and deltas inside workflows, become files on the server; nothing is replaced unasked.
import { toast } from "./host.js";
import { confirm } from "./dialog.js";
import { library } from "./library.js";
import { t } from "./text.js";

/** Install content under a name; asks before a file of this name is replaced. Returns the facts, or null. */
export async function install(name, content) {
  try {
    let facts;
    try {
      facts = await library.install(name, content);
    } catch (error) {
      if (error.status !== 409) throw error;
      if (!(await confirm(t("install.takenTitle"), t("install.taken", { name }), t("install.replace")))) return null;
      facts = await library.install(name, content, true);
    }
    toast("success", t("install.done", { name: facts.concept }), facts.name);
    return facts;
  } catch (error) {
    toast("error", t("install.failed", { name }), error.message);
    return null;
  }
}

/** Install the file that a workflow carries in a record. */
export function installRecord(record) {
  const name = String(record.file || `${record.concept}.safetensors`).replaceAll("\\", "/");
  const bytes = Uint8Array.from(atob(record.data), (c) => c.charCodeAt(0));
  return install(name, new Blob([bytes]));
}
