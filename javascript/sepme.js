// The rows of switches and strengths are drawn by the server; what they say goes into the strengths field beside them, as JSON.
(() => {
    const last = new Map(); // strengths of concepts that were switched off
    let held = null; // the control that was changed: the server draws the rows anew, and whoever moves a slider by keys goes on with it

    const rowOf = (event) => event.target.closest?.(".sepme-row");
    const strengthOf = (row) => Math.min(Math.max(row.querySelector(".sepme-number").valueAsNumber || 0, -100), 100);

    function show(row, strength, except) {
        for (const input of row.querySelectorAll(".sepme-strength, .sepme-number")) {
            if (input !== except) input.value = strength;
        }
        row.querySelector(".sepme-switch").checked = strength !== 0;
        row.classList.toggle("sepme-off", strength === 0);
    }

    function write(row, control) {
        const rows = row.closest("[id$='_rows']");
        held = [rows.id, row.dataset.concept, control.className];
        const field = document.getElementById(rows.id.replace(/_rows$/, "_strengths")).querySelector("textarea, input");
        const said = {};
        for (const each of rows.querySelectorAll(".sepme-row")) said[each.dataset.concept] = strengthOf(each);
        field.value = JSON.stringify(said);
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }

    document.addEventListener("input", (event) => {
        const row = rowOf(event);
        if (row && event.target.matches(".sepme-strength, .sepme-number")) show(row, event.target.valueAsNumber || 0, event.target);
    });

    document.addEventListener("change", (event) => {
        const row = rowOf(event);
        if (!row) return;
        if (event.target.matches(".sepme-switch")) {
            const name = row.dataset.concept;
            const strength = strengthOf(row);
            if (strength !== 0) last.set(name, strength);
            show(row, event.target.checked ? last.get(name) ?? 1 : 0);
        }
        write(row, event.target);
    });

    new MutationObserver(() => {
        if (!held || document.activeElement !== document.body) return;
        const [id, concept, name] = held;
        const rows = [...document.querySelectorAll(`#${id} .sepme-row`)];
        rows.find((row) => row.dataset.concept === concept)?.getElementsByClassName(name)[0]?.focus();
        held = null;
    }).observe(document, { childList: true, subtree: true });
})();
