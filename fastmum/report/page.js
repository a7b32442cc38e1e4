// The page is whole without this: values under the pointer, and the slider through the reconstructions.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function element(name, parent, text, space) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

function written(value, percent) {
  const shown = percent ? 100 * value : value;
  const text = Math.abs(shown) >= 1000 ? Math.round(shown).toLocaleString("en") : String(Number(shown.toPrecision(4)));
  return percent ? text + " %" : text;
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return x - points[low][0] < points[high][0] - x ? points[low] : points[high];
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const plot = figure.querySelector(".plot"), svg = figure.querySelector("svg");
  const [x0, x1, left, right] = data.x, [y0, y1, bottom, top] = data.y;
  const pixelX = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
  const bend = data.log ? Math.log : (y) => y;
  const pixelY = (y) => bottom + ((bend(y) - bend(y0)) / (bend(y1) - bend(y0))) * (top - bottom);
  const marks = element("g", svg, undefined, SVG), tip = element("div", plot);
  tip.className = "tip";
  tip.hidden = true;

  const leave = () => { marks.replaceChildren(); tip.hidden = true; };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    leave();
    const box = svg.getBoundingClientRect(), unit = svg.viewBox.baseVal.width / box.width;
    const at = x0 + (((event.clientX - box.left) * unit - left) / (right - left)) * (x1 - x0);
    if (at < x0 - 0.02 * (x1 - x0) || at > x1 + 0.02 * (x1 - x0)) return;
    const lines = data.lines.filter((line) => line.points.length);
    const found = lines.map((line) => ({ line, point: nearest(line.points, at) }));
    // All lines are read at the place of the one that has a point nearest to the pointer.
    const near = found.reduce((a, b) => (Math.abs(b.point[0] - at) < Math.abs(a.point[0] - at) ? b : a)).point[0];
    const hair = element("line", marks, undefined, SVG);
    for (const [key, value] of Object.entries({ class: "hair", x1: pixelX(near), x2: pixelX(near), y1: top, y2: bottom })) {
      hair.setAttribute(key, value);
    }
    tip.replaceChildren();
    element("div", tip, `${data.xLabel} ${written(near, false)}`);
    for (const { line } of found) {
      const [x, y] = nearest(line.points, near);
      const dot = element("circle", marks, undefined, SVG);
      for (const [key, value] of Object.entries({ class: "dot", cx: pixelX(x), cy: pixelY(y), r: 4 })) dot.setAttribute(key, value);
      dot.style.fill = line.color;
      const row = element("div", tip);
      element("i", row).style.background = line.color;
      element("span", row, line.label);
      element("b", row, written(y, data.percent));
    }
    tip.hidden = false;
    const place = pixelX(near) / unit, width = tip.offsetWidth;
    tip.style.left = `${place + 14 + width > box.width ? Math.max(0, place - width - 14) : place + 14}px`;
  });
}

for (const figure of document.querySelectorAll("figure.pictures")) {
  const slider = figure.querySelector("input"), images = [...figure.querySelectorAll(".strip img")];
  if (!slider) continue;
  const stage = figure.querySelector(".stage img"), label = figure.querySelector("output");
  const show = (index) => {
    const step = Number(images[index].dataset.step).toLocaleString("en");
    slider.value = index;
    stage.src = images[index].src;
    stage.alt = `reconstruction after ${step} steps`;
    label.textContent = `step ${step}`;
    images.forEach((image, i) => image.classList.toggle("on", i === index));
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  images.forEach((image, index) => image.addEventListener("click", () => show(index)));
  show(images.length - 1);
}
