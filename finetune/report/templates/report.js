// Comforts, all optional: without this script the page shows the same, unfiltered.
"use strict";
const all = (selector, from = document) => [...from.querySelectorAll(selector)];
const seen = (element) => element.getClientRects().length > 0;

// Which methods are shown: one rule per hidden method, for whatever carries its name, be it a column, a row or a line of a plot.
const filter = document.querySelector(".filter");
if (filter) {
  const rules = new CSSStyleSheet(); // not an element: the page's policy allows no style but its own
  document.adoptedStyleSheets = [...document.adoptedStyleSheets, rules];
  filter.hidden = false;
  filter.addEventListener("change", () => {
    const off = all("input:not(:checked)", filter).map((box) => CSS.escape(box.value));
    rules.replaceSync(off.map((row) => `[data-row="${row}"], [data-second="${row}"] { display: none !important; }`).join("\n"));
  });
}

// One of the plots of cost at a time.
const choose = document.querySelector(".switch");
if (choose) {
  const show = (key) => {
    all("button", choose).forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.plot === key)));
    all(".prices figure").forEach((figure) => { figure.hidden = figure.dataset.plot !== key; });
  };
  choose.hidden = false;
  document.querySelector(".prices").classList.add("single");
  choose.addEventListener("click", (event) => { if (event.target.dataset.plot) show(event.target.dataset.plot); });
  show(choose.querySelector("button").dataset.plot);
  // Paper has no buttons: print all of them.
  addEventListener("beforeprint", () => all(".prices figure").forEach((figure) => { figure.hidden = false; }));
  addEventListener("afterprint", () => show(choose.querySelector("[aria-pressed=true]").dataset.plot));
}

// Enlarging. Left and right go to the neighbouring method, up and down to the neighbouring prompt or seed.
const dialog = document.getElementById("enlarged");
let current = null;
const shown = (image) => {
  const large = dialog.querySelector("img");
  current = image;
  large.src = image.src;
  large.alt = image.alt;
  dialog.querySelector("figcaption").textContent = image.dataset.caption;
};
const neighbour = (image, sideways, down) => {
  const row = image.closest("tr, .couple, .instances");
  const line = all("img", row).filter(seen);
  if (sideways) return line[line.indexOf(image) + sideways];
  if (!image.closest("tr")) return undefined;
  const cell = image.closest("td");
  const rows = all("tr", row.closest("tbody"));
  return rows[rows.indexOf(row) + down]?.cells[cell.cellIndex]?.querySelector("img") ?? undefined;
};
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
all("main img").filter((image) => !image.closest(".stack")).forEach((image) => {
  // In a table one picture takes the tab key, the arrows reach the others: hundreds of stops help nobody.
  image.tabIndex = image.closest("table") && image !== image.closest("table").querySelector("img") ? -1 : 0;
  image.setAttribute("role", "button");
  image.classList.add("enlarges");
  image.addEventListener("click", () => { shown(image); dialog.showModal(); });
  image.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); image.click(); return; }
    const next = STEPS[event.key] && neighbour(image, ...STEPS[event.key]);
    if (next) { event.preventDefault(); next.focus(); }
  });
});
const go = (sideways, down) => { const next = current && neighbour(current, sideways, down); if (next) shown(next); };
dialog.addEventListener("keydown", (event) => { if (STEPS[event.key]) { event.preventDefault(); go(...STEPS[event.key]); } });
dialog.addEventListener("click", (event) => {
  const step = event.target.dataset.step;
  if (step) go(Number(step), 0);
  else if (!event.target.closest(".controls") || "close" in event.target.dataset) dialog.close();
});
dialog.addEventListener("close", () => { if (current && seen(current)) current.focus(); });

// Two methods at one prompt and seed, one over the other, with a divider.
all(".sidebyside").forEach((box) => {
  const lines = new Map(); // prompt -> seed -> row -> picture
  all("img[data-line]", box.closest("section")).forEach((image) => {
    const seeds = lines.get(image.dataset.line) ?? lines.set(image.dataset.line, new Map()).get(image.dataset.line);
    const rows = seeds.get(image.dataset.seed) ?? seeds.set(image.dataset.seed, new Map()).get(image.dataset.seed);
    rows.set(image.closest("td").dataset.row, image);
  });
  const [left, right, prompt, seed] = ["left", "right", "prompt", "seed"].map((name) => box.querySelector(`[data-side=${name}]`));
  const [under, over, range] = [box.querySelector(".under"), box.querySelector(".over"), box.querySelector("input")];
  const fill = (select, values) => {
    const before = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(before)) select.value = before;
  };
  const draw = () => {
    const rows = lines.get(prompt.value).get(seed.value);
    const pictures = [[over, left], [under, right]].map(([image, select]) => {
      const found = rows.get(select.value);
      image.src = found ? found.src : "data:,";
      image.alt = found ? found.alt : "not rendered";
      image.hidden = !found;
      return `${select.selectedOptions[0].text}${found ? "" : " (not rendered)"}`;
    });
    box.querySelector(".names").textContent = `Left: ${pictures[0]}. Right: ${pictures[1]}.`;
  };
  const seeds = () => { fill(seed, [...lines.get(prompt.value).keys()]); draw(); };
  if (!lines.size) return;
  fill(prompt, [...lines.keys()]);
  const wanted = ["lora", "dreambooth"].filter((name) => left.querySelector(`[value="${name}"]`));
  left.value = wanted[1] ?? left.options[0].value;
  right.value = wanted[0] && wanted[0] !== left.value ? wanted[0] : right.options[right.options.length - 1].value;
  seeds();
  prompt.addEventListener("change", seeds);
  [left, right, seed].forEach((select) => select.addEventListener("change", draw));
  range.addEventListener("input", () => box.style.setProperty("--cut", `${range.value}%`));
  box.hidden = false;
});

if (navigator.clipboard) {
  all(".snippet button").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });
}
