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

const MOST = 16 << 20; // bytes of a header that can be a delta's

/** Whether a file is one of ours, by its header. */
export async function isDelta(file) {
  try {
    const size = Number(new DataView(await file.slice(0, 8).arrayBuffer()).getBigUint64(0, true));
    if (size > MOST) return false;
    return String(JSON.parse(await file.slice(8, 8 + size).text()).__metadata__?.format).startsWith("sepme.");
  } catch {
    return false;
  }
}

/** Install the file that a workflow carries in a record. */
export function installRecord(record) {
  const name = String(record.file || `${record.concept}.safetensors`).replaceAll("\\", "/");
  const bytes = Uint8Array.from(atob(record.data), (c) => c.charCodeAt(0));
  return install(name, new Blob([bytes]));
}
