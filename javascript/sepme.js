// The rows of switches and sliders are drawn by the server; what they say goes into the strengths field beside them, as JSON.
(() => {
    const last = new Map(); // strengths of concepts that were switched off

    const rowOf = (event) => event.target.closest?.(".sepme-row");

    function show(row, strength) {
        row.querySelector(".sepme-strength").value = strength;
        row.querySelector("output").textContent = strength;
        row.querySelector(".sepme-switch").checked = strength !== 0;
        row.classList.toggle("sepme-off", strength === 0);
    }

    function write(row) {
        const rows = row.closest("[id$='_rows']");
        const field = document.getElementById(rows.id.replace(/_rows$/, "_strengths")).querySelector("textarea, input");
        const said = {};
        for (const each of rows.querySelectorAll(".sepme-row")) {
            said[each.dataset.concept] = Number(each.querySelector("output").textContent);
        }
        field.value = JSON.stringify(said);
        field.dispatchEvent(new Event("input", { bubbles: true }));
    }

    document.addEventListener("input", (event) => {
        const row = rowOf(event);
        if (row && event.target.matches(".sepme-strength")) show(row, Number(event.target.value));
    });

    document.addEventListener("change", (event) => {
        const row = rowOf(event);
        if (!row) return;
        if (event.target.matches(".sepme-switch")) {
            const name = row.dataset.concept;
            const strength = Number(row.querySelector("output").textContent);
            if (strength !== 0) last.set(name, strength);
            show(row, event.target.checked ? last.get(name) ?? 1 : 0);
        }
        write(row);
    });
})();
