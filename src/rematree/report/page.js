"use strict";
// Draws what page.py put into words. Sizes of pictures are those of the window, so that text keeps its size.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const slider = document.getElementById("budget");
  const byId = (id) => document.getElementById(id);

  function element(name, attributes = {}, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  }

  // A picture with axes: places numbers, draws ticks, and adds shapes by name.
  function picture(node, title, size, across, up) {
    const width = Math.max(280, node.clientWidth);
    const box = { left: 62, right: width - 14, top: 20, bottom: size - 40 };
    const svg = element("svg", { viewBox: `0 0 ${width} ${size}`, height: size, role: "img", "aria-label": title });
    node.replaceChildren(svg);
    const x = (v) => box.left + ((v - across.low) / (across.high - across.low || 1)) * (box.right - box.left);
    const y = (v) => box.bottom - ((v - up.low) / (up.high - up.low || 1)) * (box.bottom - box.top);
    const add = (name, attributes, text) => svg.appendChild(element(name, attributes, text));
    const line = (x1, y1, x2, y2, kind) => add("line", { x1, y1, x2, y2, class: kind });
    const words = (at, top, text, anchor = "start", kind = "") =>
      add("text", { x: at, y: top, "text-anchor": anchor, class: kind }, text);
    for (const [value, text] of up.ticks) {
      if (value > up.high || value < up.low) continue;
      line(box.left, y(value), box.right, y(value), "grid");
      words(box.left - 6, y(value) + 4, text, "end", "quiet");
    }
    let free = -Infinity;
    for (const [value, text] of across.ticks) {
      if (value > across.high || value < across.low) continue;
      const at = x(value);
      line(at, box.bottom, at, box.bottom + 4, "axis");
      if (at < free) continue;
      words(at, box.bottom + (across.below || 17), text, at > box.right - 20 ? "end" : "middle", "quiet");
      free = at + 7 * text.length + 10;
    }
    line(box.left, box.bottom, box.right, box.bottom, "axis");
    return { svg, box, x, y, add, line, words };
  }

  // A name that is kept inside the picture, on the side of the point where there is room.
  function beside(drawn, at, top, text, kind = "halo") {
    const right = at + 10 + 6.6 * text.length < drawn.box.right;
    drawn.words(right ? at + 9 : at - 9, top, text, right ? "start" : "end", kind);
  }

  function timeline(node, step, title, budget, scale) {
    const across = { low: 0, high: data.scale.seconds, ticks: data.scale.ticks, below: 34 };
    const up = { low: 0, high: scale[0], ticks: scale[1] };
    const drawn = picture(node, `${title}: peak ${step.peak}, ${step.step}`, 250, across, up);
    const { box, x, y, add, line, words } = drawn;
    let now = 0;
    let highest = [0, 0];
    const phases = [];
    for (const [phase, kind, bytes, seconds, cells] of step.timeline) {
      const left = x(now);
      const bar = add("rect", {
        x: left, y: y(bytes), width: Math.max(0.5, x(now + seconds) - left), height: box.bottom - y(bytes),
        fill: `url(#fill-${kind})`, class: "bar",
      });
      bar.appendChild(element("title", {}, cells.filter(Boolean).join(", ")));
      if (bytes > highest[0]) highest = [bytes, now + seconds / 2];
      const last = phases[phases.length - 1];
      if (last && last[0] === phase) last[2] = now + seconds;
      else phases.push([phase, now, now + seconds]);
      now += seconds;
    }
    for (const [phase, from, to] of phases) {
      if (x(to) - x(from) < 6.4 * phase.length) continue;
      line(x(to), box.bottom, x(to), box.bottom + 16, "axis");
      words((x(from) + x(to)) / 2, box.bottom + 15, phase, "middle");
    }
    line(box.left, y(step.floor), x(now), y(step.floor), "floor");
    if (budget[0] <= up.high) {
      line(box.left, y(budget[0]), box.right, y(budget[0]), "budget");
      words(box.right, y(budget[0]) - 5, `budget ${budget[1]}`, "end", "budget-text halo");
    }
    const at = x(highest[1]);
    add("path", { d: `M${at - 5} ${y(highest[0]) - 9}h10l-5 7z`, class: "plain" });
    const below = budget[0] <= up.high && Math.abs(y(budget[0]) - y(highest[0])) < 26 && y(budget[0]) <= y(highest[0]);
    beside(drawn, at, y(highest[0]) + (below ? 14 : -3), `peak ${step.peak}`);
  }

  function square(drawn, plan, kind, size) {
    const [at, top] = [drawn.x(plan.bytes), drawn.y(plan.seconds)];
    return drawn.add("rect", { x: at - size, y: top - size, width: 2 * size, height: 2 * size, class: kind });
  }

  function frontier(budget, chosen) {
    const across = { low: 0, high: data.scale.bytes, ticks: data.scale.byteTicks };
    const drawn = picture(byId("frontier"), "peak and time of every plan", 300, across, data.stepScale);
    const { box, x, y, add, line, words } = drawn;
    const least = x(data.plans[0].bytes);
    add("rect", { x: box.left, y: box.top, width: least - box.left, height: box.bottom - box.top, fill: "url(#fill-none)" });
    if (least - box.left > 70) words((box.left + least) / 2, box.top + 16, "nothing fits", "middle", "halo");
    let stairs = "";
    for (const index of data.front) {
      const [at, top] = [x(data.plans[index].bytes), y(data.plans[index].seconds)];
      stairs += stairs ? `H${at}V${top}` : `M${at} ${box.top}V${top}`;
    }
    add("path", { d: `${stairs}H${box.right}`, class: "stairs" });
    if (budget[0] <= data.scale.bytes) {
      line(x(budget[0]), box.top, x(budget[0]), box.bottom, "budget");
      beside(drawn, x(budget[0]) - 4, box.top - 6, `budget ${budget[1]}`, "budget-text halo");
    }
    const plain = data.before;
    const mark = add("circle", { cx: x(plain.bytes), cy: y(plain.seconds), r: 9, class: "outline" });
    mark.appendChild(element("title", {}, `plain step: ${plain.peak}, ${plain.step}`));
    data.plans.forEach((plan, index) => {
      const made = square(drawn, plan, index === data.inForce ? "plan in-force" : "plan", 4.5);
      made.appendChild(element("title", {}, `${plan.peak}, ${plan.step}`));
    });
    const mine = data.plans[data.inForce];
    beside(drawn, x(mine.bytes) + 4, y(mine.seconds) + 19, "this run");
    words(x(plain.bytes) - 9, y(plain.seconds) - 12, "plain", "end", "halo");
    if (chosen !== null) {
      const plan = data.plans[chosen];
      add("circle", { cx: x(plan.bytes), cy: y(plan.seconds), r: 10, class: "ring" });
      beside(drawn, x(plan.bytes) + 4, y(plan.seconds) - 9, plan.step);
    }
    words((box.left + box.right) / 2, box.bottom + 34, "across: predicted peak; upwards: time", "middle", "quiet");
  }

  function series(node, figure, axis, column, title) {
    figure.hidden = !axis;
    if (!axis) return;
    const known = data.run.steps.filter((step) => step[column] !== null);
    const numbers = data.run.steps.map((step) => step[0]);
    const [first, last] = [Math.min(...numbers), Math.max(...numbers)];
    const every = Math.max(1, Math.ceil((last - first + 1) / 12));
    const ticks = numbers.filter((n) => (n - first) % every === 0).map((n) => [n, String(n)]);
    const across = { low: first - 0.5, high: last + 0.5, ticks };
    const drawn = picture(node, title, 220, across, { low: 0, high: axis.high, ticks: axis.ticks });
    const { box, x, y, add, line, words } = drawn;
    const path = known.map((step, i) => `${i ? "L" : "M"}${x(step[0])} ${y(step[column])}`).join("");
    add("path", { d: path, class: "trace" });
    line(box.left, y(axis.predicted[0]), box.right, y(axis.predicted[0]), "predicted");
    if (axis.limit) {
      line(box.left, y(axis.limit[0]), box.right, y(axis.limit[0]), "budget");
      words(box.right, y(axis.limit[0]) - 5, axis.limit[1], "end", "budget-text halo");
    }
    const crowded = axis.limit && Math.abs(y(axis.limit[0]) - y(axis.predicted[0])) < 20;
    words(box.left + 6, y(axis.predicted[0]) + (crowded ? 15 : -5), axis.predicted[1], "start", "halo");
    for (const step of known) {
      const dot = add("circle", { cx: x(step[0]), cy: y(step[column]), r: 4, class: "plain" });
      dot.appendChild(element("title", {}, `step ${step[0]}: ${step[column + 2]}`));
    }
    words((box.left + box.right) / 2, box.bottom + 34, "step of the run; dots are measured", "middle", "quiet");
  }

  function table(node, headers, rows, right, chosen = null) {
    const row = (cells, name) => {
      const made = document.createElement("tr");
      cells.forEach((text, column) => {
        const cell = made.appendChild(document.createElement(name));
        // Names of regions may be broken where their parts meet.
        for (const piece of String(text).split(/(?<=[,._}])(?=[a-z{])/)) cell.append(piece, document.createElement("wbr"));
        if (name === "th") cell.scope = "col";
        if (right.includes(column)) cell.className = "right";
      });
      return made;
    };
    const head = document.createElement("thead");
    head.append(row(headers, "th"));
    const body = document.createElement("tbody");
    body.append(...rows.map((cells) => row(cells, "td")));
    if (chosen !== null) {
      body.rows[chosen].className = "chosen";
      body.rows[chosen].setAttribute("aria-current", "true");
    }
    node.replaceChildren(head, body);
  }

  const timelineHeaders = ["part", "decision", "live when it begins", "most live", "time"];

  function timelineTable(node, step) {
    table(node, timelineHeaders, step.timeline.map((part) => part[4]), [2, 3, 4]);
  }

  function verdict(budget, chosen) {
    if (chosen === null) return `Nothing fits ${budget[1]}: the smallest peak that can be reached is ${data.least}.`;
    const plan = data.plans[chosen];
    const own = chosen === data.inForce ? " It is the plan of this run." : "";
    return `Within ${budget[1]} the fastest stored plan peaks at ${plan.peak} and takes ${plan.step}.${own}`;
  }

  function show() {
    const budget = data.budgets[slider.value];
    const chosen = budget[2];
    byId("budget-text").textContent = budget[1];
    slider.setAttribute("aria-valuetext", budget[1]);
    byId("reset").disabled = Number(slider.value) === data.start;
    byId("verdict").textContent = verdict(budget, chosen);
    const plan = chosen === null ? null : data.plans[chosen];
    for (const name of ["peak", "step", "extra", "recompute", "exact"]) byId(name).textContent = plan ? plan[name] : "-";
    const same = [data.scale.bytes, data.scale.byteTicks];
    timeline(byId("before"), data.before, "before", budget, same);
    byId("after-title").textContent = plan ? "After: under the plan for this budget" : "After: no plan fits this budget";
    if (plan) timeline(byId("after"), plan, "after", budget, byId("zoom").checked ? plan.scale : same);
    else byId("after").replaceChildren();
    timelineTable(byId("timeline"), plan || { timeline: [] });
    byId("prefix").textContent = plan && plan.prefix ? `Regions inside ${plan.prefix}:` : "";
    table(byId("decisions"), ["region", "decision", "keeps", "added time"], plan ? plan.rows : [], [2, 3]);
    frontier(budget, chosen);
    const rows = data.plans.map((p, i) => [p.peak, p.step, p.extra, p.recompute, i === data.inForce ? "this run" : ""]);
    rows.push([data.before.peak, data.before.step, "none", data.before.recompute, "plain step"]);
    table(byId("plans"), ["peak", "step", "against plain", "recomputation", ""], rows, [0, 1], chosen);
  }

  function once() {
    for (const [name, value] of data.facts) {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value;
      byId("facts").append(term, text);
    }
    const entries = [...data.kinds, ["rest", "the rest", "embedding, head and loss, optimizer"]];
    for (const [kind, name, meaning] of entries) {
      const swatch = element("svg", { width: 28, height: 16, "aria-hidden": "true" });
      swatch.append(element("rect", { width: 28, height: 16, fill: `url(#fill-${kind})` }));
      const item = document.createElement("li");
      item.append(swatch, `${name}: ${meaning}`);
      byId("legend").append(item);
    }
    const floor = element("svg", { width: 28, height: 16, "aria-hidden": "true" });
    floor.append(element("line", { x1: 0, y1: 8, x2: 28, y2: 8, class: "floor" }));
    const item = document.createElement("li");
    item.append(floor, "what no plan changes: weights, optimizer state, libraries");
    byId("legend").append(item);
    for (const note of data.notes) byId("notes").appendChild(document.createElement("li")).textContent = note;
    timelineTable(byId("timeline-before"), data.before);
    table(byId("compared"), ["", "predicted", "measured", "off by"], data.compared, [1, 2, 3]);
    table(byId("steps"), ["step", "time", "peak"], data.run.steps.map((s) => [s[0], s[3], s[4]]), [0, 1, 2]);
    byId("steps-details").hidden = data.run.steps.length === 0;
    byId("measured").hidden = data.run.steps.length === 0 && data.compared.length === 0;
  }

  function draw() {
    show();
    series(byId("run-seconds"), byId("seconds-figure"), data.run.seconds, 1, "seconds of each step");
    series(byId("run-bytes"), byId("bytes-figure"), data.run.bytes, 2, "peak of each step");
  }

  slider.max = data.budgets.length - 1;
  slider.value = data.start;
  slider.addEventListener("input", show);
  byId("zoom").addEventListener("change", show);
  byId("reset").addEventListener("click", () => {
    slider.value = data.start;
    show();
    slider.focus();
  });
  window.addEventListener("resize", draw);
  once();
  draw();
})();
