// A dial (input[data-values]) shows one column of every sheet in its [data-sheets]; a dial outside of any turns all of the page's dials.
// A choice (select[data-choice]) shows those parts of its [data-choices] that carry the chosen names. Without script everything is shown.
"use strict";
document.documentElement.classList.add("js");

const all = (what, within = document) => [...within.querySelectorAll(what)];
const values = (dial) => JSON.parse(dial.dataset.values);
const sheets = (dial) => dial.closest("[data-sheets]");
const dials = all("input[data-values]");
const wholes = all("input[data-whole]");

function turn(dial, at) {
  const label = JSON.parse(dial.dataset.labels)[at];
  dial.value = at;
  dial.setAttribute("aria-valuetext", label);
  dial.parentElement.querySelector(".says").textContent = label;
  sheets(dial)?.style.setProperty("--at", at);
}

function nearest(list, value) {
  const gaps = list.map((v) => Math.abs(v - value));
  return gaps.indexOf(Math.min(...gaps));
}

function unfold(box, whole) {
  box.checked = whole;
  sheets(box)?.classList.toggle("whole", whole);
}

for (const dial of dials) {
  turn(dial, Number(dial.value)); // a browser that goes back keeps the value, not the picture
  dial.addEventListener("input", () => {
    const at = Number(dial.value);
    turn(dial, at);
    if (sheets(dial)) return;
    for (const other of dials) if (other !== dial) turn(other, nearest(values(other), values(dial)[at]));
  });
}

for (const box of wholes) {
  unfold(box, box.checked);
  box.addEventListener("change", () => (sheets(box) ? [box] : wholes).forEach((one) => unfold(one, box.checked)));
}

for (const choices of all("[data-choices]")) {
  const selects = all("select[data-choice]", choices);
  const show = () => {
    for (const part of all("[data-part]", choices)) part.hidden = selects.some((s) => part.dataset[s.dataset.choice] !== s.value);
  };
  selects.forEach((select) => select.addEventListener("change", show));
  show();
}
