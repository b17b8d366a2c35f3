"use strict";
// Tabs, the listing's order and filters, tooltips. The page is complete without any of it.
(() => {
  const tablist = document.querySelector("[role=tablist]");
  const tabs = [...tablist.querySelectorAll("[role=tab]")];

  const select = (tab, focus) => {
    for (const one of tabs) {
      const chosen = one === tab;
      one.setAttribute("aria-selected", String(chosen));
      one.tabIndex = chosen ? 0 : -1;
      document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
    }
    if (focus) {
      tab.focus();
      tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  };

  const fromHash = () => tabs.find((tab) => "#" + tab.getAttribute("aria-controls") === location.hash);

  tabs.forEach((tab, number) => {
    const panel = document.getElementById(tab.getAttribute("aria-controls"));
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    tab.addEventListener("click", () => {
      select(tab, false);
      history.replaceState(null, "", "#" + panel.id);
    });
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: number + 1, ArrowLeft: number - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = tabs[(to + tabs.length) % tabs.length];
      select(next, true);
      history.replaceState(null, "", "#" + next.getAttribute("aria-controls"));
    });
  });
  tablist.hidden = false;
  document.body.classList.add("tabbed");
  select(fromHash() || tabs[0], false);
  addEventListener("hashchange", () => fromHash() && select(fromHash(), false));

  for (const listing of document.querySelectorAll("[data-listing]")) {
    const body = listing.querySelector("tbody");
    const rows = [...body.rows];
    const form = listing.querySelector("form");
    const find = form.querySelector("[data-find]");
    const filters = [...form.querySelectorAll("[data-filter]")];
    const words = rows.map((row) => row.textContent.toLowerCase());
    const show = () => {
      const wanted = find.value.trim().toLowerCase();
      let count = 0;
      rows.forEach((row, number) => {
        const fits = filters.every((one) => !one.value || row.getAttribute("data-k" + one.dataset.filter) === one.value);
        row.hidden = !(fits && words[number].includes(wanted));
        count += row.hidden ? 0 : 1;
      });
      form.querySelector("output").textContent = `${count} of ${rows.length}`;
    };
    form.hidden = false;
    form.addEventListener("input", show);
    form.addEventListener("change", show);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(show));
    const heads = [...listing.querySelectorAll("thead th")];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      button.addEventListener("click", () => {
        const figures = button.dataset.sort === "figure";
        const before = head.getAttribute("aria-sort");
        const down = before ? before === "ascending" : figures;
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = (row) => (figures ? Number(row.cells[column].dataset.order) : row.cells[column].textContent);
        const compare = (a, b) => (figures ? a - b : a.localeCompare(b, "en", { numeric: true }));
        const sorted = [...rows].sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
        body.append(...sorted);
      });
    });
  }

  const tip = document.getElementById("tip");
  const said = (target) => {
    const mark = target instanceof Element ? target.closest(".drawing [aria-label][role=graphics-symbol]") : null;
    return mark && !mark.getAttribute("aria-roledescription")?.match(/axis|legend|title/) ? mark.getAttribute("aria-label") : "";
  };
  const point = (event) => {
    const text = said(event.target);
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - width - 4)) + "px";
    tip.style.top = (event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18) + "px";
  };
  addEventListener("pointermove", point);
  addEventListener("pointerdown", point);
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
