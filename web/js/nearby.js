// Words near a concept: what a row of SepME Erase shows of them, and what a user says of them.
import { t } from "./text.js";
import { key, splitNames } from "./toggles.js";

const MOST = 3; // sentences shown

const unique = (words) => [...new Set(words)];

/** A list that somebody typed, in small letters, each word once. */
export const typed = (text) => unique(splitNames(text).map(key)).filter(Boolean);

/** The words that must not change and those that mean the same: found by the server, and as the row says. */
export function words({ stays = [], same = [], free = [] }, { near = [], synonyms = [] }) {
  return {
    stay: unique([...stays, ...near]).filter((word) => !same.includes(word) && !free.includes(word)),
    same: unique([...same, ...synonyms]).filter((word) => !stays.includes(word) && !free.includes(word)),
  };
}

/** A row's entry after its lists were edited to `stay` and `same`: what differs from what was found, which a shared workflow takes along. */
export function said(entry, found, stay, same) {
  const before = words(entry, found);
  const { stays = [], same: meant = [], free = [], ...rest } = entry;
  stay = stay.filter((word) => !same.includes(word));
  const left = [...before.stay.filter((word) => !stays.includes(word)), ...before.same.filter((word) => !meant.includes(word))];
  const lists = {
    stays: stay.filter((word) => stays.includes(word) || !before.stay.includes(word)),
    same: same.filter((word) => meant.includes(word) || !before.same.includes(word)),
    free: unique([...free, ...left]).filter((word) => !stay.includes(word) && !same.includes(word)),
  };
  return { ...rest, ...Object.fromEntries(Object.entries(lists).filter(([, list]) => list.length)) };
}

/** What was measured of rows, in sentences `{grade, text, row}`: of those that change what they should not, or one for all that do not. */
export function sentences(rows) {
  const measured = rows.filter(({ delta }) => delta?.collateral && delta.misses);
  const lines = [];
  for (const row of measured) {
    const { grade, collateral, misses } = row.delta;
    const more = collateral.count > collateral.worst.length ? " …" : "";
    if (collateral.count) lines.push({ grade, row, text: t("erase.changes", { name: row.name, count: collateral.count, of: collateral.of, words: collateral.worst.join(", ") + more }) });
    else if (misses.count) lines.push({ grade, row, text: t("erase.missed", { name: row.name, count: misses.count, of: misses.of, example: misses.worst[0] }) });
  }
  if (measured.length && !lines.length) {
    const grade = ["poor", "fair", "good"].find((g) => measured.some(({ delta }) => delta.grade === g)) ?? "unknown";
    const key = { good: "erase.safe", fair: "erase.nearlySafe" }[grade] ?? `grade.${grade}`;
    lines.push({ grade, text: t(key, { of: measured[0].delta.collateral.of }) });
  }
  return lines.sort((a, b) => (b.grade === "poor") - (a.grade === "poor")).slice(0, MOST);
}
