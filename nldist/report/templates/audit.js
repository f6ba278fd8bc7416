"use strict";
// The gallery: filter, sort, pages, and what a person marks. Everything that users named is put in as text.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 60, MARKS = ["wrong", "right", "unsure"], STORE = "nldist-audit-" + data.run;
  const byId = (id) => document.getElementById(id);
  const cards = byId("cards");
  const cardsOf = new Map(); // key -> what redraws its cards: an image may have one in the gallery and in a group
  const fields = ["search", "given", "suggested", "marked", "sort"].map((id) => [id, byId(id)]);
  let page = 0, shown = [], kept = true;

  // key -> {mark, given, suggested}, in names of classes. They outlive the report: also those of images that a later
  // one does not draw, or has another suggestion for.
  let marks = new Map();
  const load = () => {
    if (!kept) return; // what this browser does not keep is here alone
    try { marks = new Map(JSON.parse(localStorage.getItem(STORE) || "[]")); } catch { kept = false; }
  };
  const save = () => {
    try { localStorage.setItem(STORE, JSON.stringify([...marks])); } catch { kept = false; }
  };
  const own = (item) => marks.get(item.key) || { mark: "", suggested: "" };
  const markOf = (item) => own(item).mark;
  const setMark = (item, mark, suggested) => {
    load(); // another tab may have marked others
    if (mark) marks.set(item.key, { mark, given: className(item.given), suggested });
    else marks.delete(item.key);
    save();
    for (const show of cardsOf.get(item.key) || []) show();
    tell();
  };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };
  const text = (value) => element("bdi", {}, value);
  const names = new Set(data.classes);
  const className = (number) => (number < 0 ? "-" : data.classes[number]);

  const card = (item) => {
    const picture = data.pictures[item.id];
    const image = picture
      ? element("img", { src: "data:image/jpeg;base64," + picture, alt: "", decoding: "async" })
      : element("div", { class: "none" }, "not readable");
    const row = (name, value) => [element("dt", {}, name), element("dd", {}, value)];
    const labels = element("dl", { class: "labels" },
      ...row("given", text(className(item.given))), ...row("suggested", text(className(item.suggested))),
      ...row("p right", item.p === null ? "-" : item.p < 0.001 ? "< 0.001" : item.p.toFixed(3)));
    const buttons = MARKS.map((mark) => element("button", { type: "button", "data-mark": mark }, mark));
    const proposed = item.suggested >= 0 && item.suggested !== item.given ? className(item.suggested) : "";
    const right = element("input", { type: "text", list: "classes-list", placeholder: "right class?", "aria-label": "right class", autocomplete: "off" });
    const made = element("li", { class: "card", tabindex: "0", "aria-label": `${item.key}: given ${className(item.given)}, suggested ${className(item.suggested)}` },
      image, labels, element("div", { class: "key" }, (item.rank === null ? "" : `#${item.rank} `), text(item.key)),
      right, element("div", { class: "marks" }, ...buttons));
    const show = () => {
      const { mark, suggested } = own(item);
      made.dataset.mark = mark;
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.mark === mark));
      right.hidden = mark !== "wrong";
      right.value = mark === "wrong" ? suggested : proposed;
    };
    const choose = (mark) => {
      setMark(item, markOf(item) === mark ? "" : mark, proposed);
      if (mark === "wrong" && markOf(item) && !proposed) right.focus();
    };
    for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.mark));
    right.addEventListener("change", () => {
      const known = names.has(right.value) && right.value !== className(item.given);
      if (known || right.value === "") setMark(item, "wrong", right.value);
      right.setCustomValidity(known || right.value === "" ? "" : "another class of this data set");
      right.reportValidity();
    });
    made.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || event.target === right) return;
      const mark = { w: "wrong", r: "right", u: "unsure" }[event.key.toLowerCase()];
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (mark) choose(mark);
      else if (step) {
        const next = step > 0 ? made.nextElementSibling : made.previousElementSibling;
        if (next) next.focus();
        event.preventDefault();
      }
    });
    cardsOf.set(item.key, [...(cardsOf.get(item.key) || []), Object.assign(show, { card: made })]);
    show();
    return made;
  };

  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  const orders = {
    rank: (a, b) => a.rank - b.rank,
    sure: (a, b) => b.rank - a.rank,
    key: (a, b) => compare(a.key, b.key),
    given: (a, b) => compare(className(a.given), className(b.given)) || a.rank - b.rank,
    suggested: (a, b) => compare(className(a.suggested), className(b.suggested)) || a.rank - b.rank,
  };
  const values = () => Object.fromEntries(fields.map(([id, field]) => [id, field.value]));
  const filter = () => {
    const { search, given, suggested, marked, sort } = values(), wanted = search.toLowerCase();
    shown = data.items.filter((item) =>
      (!wanted || item.key.toLowerCase().includes(wanted)) &&
      (given === "" || item.given === Number(given)) && (suggested === "" || item.suggested === Number(suggested)) &&
      (marked === "" || markOf(item) === (marked === "none" ? "" : marked)));
    shown.sort(orders[sort]);
    turn(0);
  };
  const turn = (to) => {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(to, 0), pages - 1);
    cards.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(card));
    for (const [key, shows] of cardsOf) cardsOf.set(key, shows.filter((show) => show.card.isConnected));
    byId("page").textContent = `page ${page + 1} of ${pages}`;
    byId("before").disabled = page === 0;
    byId("after").disabled = page === pages - 1;
    tell();
  };
  const tell = () => {
    const all = [...marks.values()];
    const marked = MARKS.map((mark) => `${all.filter((each) => each.mark === mark).length} ${mark}`).join(", ");
    const open = all.filter((each) => each.mark === "wrong" && !each.suggested).length;
    byId("told").textContent = `${shown.length.toLocaleString("en")} of ${data.items.length.toLocaleString("en")} images. Marked: ${marked}.`
      + (open ? ` Of the wrong ones ${open} say no right class yet.` : "")
      + (kept ? "" : " This browser keeps no marks: download them before you close the page.");
  };

  const cell = (value) => (/[",\r\n]|^\s|\s$/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  const download = () => {
    load();
    const rows = [...marks].map(([key, { mark, given, suggested }]) => [key, given, suggested, mark]);
    const lines = [["key", "given", "suggested", "mark"], ...rows].map((row) => row.map(cell).join(",") + "\r\n");
    const url = URL.createObjectURL(new Blob(lines, { type: "text/csv" }));
    element("a", { href: url, download: "marks.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  };

  const fill = (id, name) => {
    const numbers = [...new Set(data.items.map((item) => item[name]))].filter((number) => number >= 0);
    numbers.sort((a, b) => compare(className(a), className(b)));
    byId(id).append(...numbers.map((number) => element("option", { value: number }, className(number))));
  };
  const clear = () => {
    for (const [id, field] of fields) field.value = id === "sort" ? "rank" : "";
  };
  const choose = (id, value) => {
    const field = byId(id);
    if (value !== "" && ![...field.options].some((option) => option.value === value))
      field.append(element("option", { value }, className(Number(value))));
    field.value = value;
  };

  load();
  byId("classes-list").append(...data.classes.map((name) => element("option", { value: name })));
  fill("given", "given");
  fill("suggested", "suggested");
  for (const [, field] of fields) field.addEventListener("input", filter);
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("all").addEventListener("click", () => { clear(); filter(); });
  byId("before").addEventListener("click", () => turn(page - 1));
  byId("after").addEventListener("click", () => turn(page + 1));
  byId("download").addEventListener("click", download);
  for (const button of document.querySelectorAll("button[data-given]"))
    button.addEventListener("click", () => {
      clear();
      choose("given", button.dataset.given);
      choose("suggested", button.dataset.suggested || "");
      filter();
      byId("gallery").scrollIntoView();
      (cards.firstElementChild || byId("search")).focus({ preventScroll: true });
    });
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select")) return; // letters typed there
    if (event.key === "<") turn(page - 1);
    else if (event.key === ">") turn(page + 1);
  });
  window.addEventListener("storage", () => {
    load();
    for (const shows of cardsOf.values()) for (const show of shows) show();
    tell();
  });
  const groups = byId("groups");
  if (groups)
    groups.append(...data.groups.map((group) => {
      const more = group.count > group.items.length ? `, ${group.count.toLocaleString("en")} times, ${group.items.length} shown` : "";
      return element("li", {}, (group.exact ? "the same file" : "looks the same") + more,
        element("ul", { class: "cards" }, ...group.items.map(card)));
    }));
  filter();
})();
