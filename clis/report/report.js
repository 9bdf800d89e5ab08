/* Shows the data embedded in the page. One state (score, class, run) and sections that draw themselves again when
   a part of it changes. Names reach the page as text nodes only, never as HTML. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const RIGHT = 0, CLASS = 1, LOCATION = 2, DUPLICATE = 3, NOTHING = 4, NOT_JUDGED = 5, MISSED = 6;
  const VERDICTS = [
    { name: "right", sign: "✓", color: "#00916e", dash: [], width: 1.6, help: "IoU of at least 0.5 with an object of its class" },
    { name: "wrong class", sign: "≠", color: "#d98200", dash: [9, 4], width: 2.6, help: "IoU of at least 0.5 with an object of another class" },
    { name: "box off", sign: "↔", color: "#b5006b", dash: [2, 3], width: 2.6, help: "IoU of 0.1 to 0.5 with an object of its class" },
    { name: "duplicate", sign: "2×", color: "#7b5cd6", dash: [9, 3, 2, 3], width: 2, help: "the object is already taken by a box with a higher score" },
    { name: "nothing there", sign: "✗", color: "#d0311e", dash: [], width: 3.2, help: "no such object: IoU below 0.1 with those of its class, below 0.5 with all others" },
    { name: "not judged", sign: "?", color: "#6b7580", dash: [1, 4], width: 1.4, help: "no mistake: the annotation does not say whether the class is in the image, or the metric ignores the box" },
    { name: "missed", sign: "○", color: "#0072b2", dash: [4, 4], width: 3, help: "an object on which no box has the right class, another class, or its class poorly located" },
  ];
  const MISTAKES = [CLASS, LOCATION, DUPLICATE, NOTHING, MISSED];
  const COLORS = ["#1a7fc1", "#d55e00", "#009e73", "#cc79a7", "#b07800", "#56b4e9"];
  const DASHES = ["", "7 4", "2 3", "9 3 2 3", "12 4", "1 4"];
  /** Which dashes and which marker: from the seventh run on colors come again, with another form. */
  const formOf = (run) => (run + Math.floor(run / 6)) % 6;
  const GROUP_NAMES = { all: "all", r: "rare", c: "common", f: "frequent" };
  const PAGE_SIZES = { classes: 25, images: 12, pairs: 15, regions: 24 };

  // --- small tools ---

  function element(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value != null) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child != null));
    return node;
  }

  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
    node.append(...children.flat());
    return node;
  }

  function unpack(packed) {
    const text = atob(packed.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const kinds = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
    return new kinds[packed.type](bytes.buffer);
  }

  /** Unpack every array within an object, in place. */
  function unpackAll(value) {
    for (const [name, each] of Object.entries(value || {})) {
      if (each && typeof each === "object" && "type" in each && "data" in each) value[name] = unpack(each);
      else if (each && typeof each === "object" && !Array.isArray(each)) unpackAll(each);
    }
    return value;
  }

  const percent = (value) => (value == null || value < 0 ? "–" : (100 * value).toFixed(1));
  const signed = (value) => (value <= -1 ? "–" : (value >= 0 ? "+" : "−") + Math.abs(100 * value).toFixed(1));
  const short = (value) => (value == null ? "–" : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 0.001) ? value.toExponential(1) : String(Number(value.toPrecision(3))));
  const plural = (count, word, words = `${word}s`) => `${count.toLocaleString("en")} ${count === 1 ? word : words}`;
  const clear = (node, ...children) => node.replaceChildren(...children.flat().filter((child) => child != null));
  const letter = (run) => String.fromCharCode(65 + (run % 26));

  const runs = data.runs;
  const judgedRuns = runs.map((_, run) => run).filter((run) => runs[run].judged);
  runs.forEach((run) => unpackAll(run.judged));
  const images = unpackAll(data.images);
  const classes = data.classes;
  const names = classes ? classes.names : [];
  const label_of = new Map(names.map((name, label) => [name, label]));

  /** A sign for a run that color-blind readers and printers keep: its letter, its line. */
  function runMark(run, withName = true) {
    const line = svg("svg", { width: 34, height: 12, "aria-hidden": "true" },
      svg("line", { x1: 0, x2: 34, y1: 6, y2: 6, stroke: COLORS[run % 6], "stroke-width": 3, "stroke-dasharray": DASHES[formOf(run)] }));
    return element("span", { class: "run-mark" }, line, withName ? `${letter(run)}  ${runs[run].name}` : letter(run));
  }

  // --- state ---

  const state = { score: data.score, label: -1, run: judgedRuns[0] ?? 0 };
  const listeners = [];
  let waiting = null;

  /** Draw now, and again when one of these parts of the state has changed. */
  function follow(parts, draw) {
    listeners.push({ parts, draw });
    draw();
  }

  function change(values) {
    const parts = Object.keys(values).filter((key) => state[key] !== values[key]);
    Object.assign(state, values);
    if (!parts.length) return;
    waiting = new Set([...(waiting || []), ...parts]);
    requestAnimationFrame(() => {
      const changed = waiting;
      waiting = null;
      if (changed) for (const each of listeners) if (each.parts.some((part) => changed.has(part))) each.draw();
    });
  }

  const threshold = () => Math.round(state.score * data.units);

  // --- what the boxes are at a score ---

  const cache = new Map();
  function cached(key, make) {
    if (!cache.has(key)) {
      if (cache.size > 24) cache.clear();
      cache.set(key, make());
    }
    return cache.get(key);
  }

  /** What happens to every object at the score: the best box on it decides. Also per class, and called what. */
  function fates(run) {
    const least = threshold();
    return cached(`fates ${run} ${least}`, () => {
      const { found, other, otherLabels, off } = runs[run].judged.truths;
      const { labels, required } = images;
      const fate = new Uint8Array(labels.length).fill(NOT_JUDGED);
      const counts = { required: new Uint32Array(names.length) };
      for (const kind of [RIGHT, CLASS, LOCATION, MISSED]) counts[kind] = new Uint32Array(names.length);
      const pairs = new Map();
      const at = (scores, i) => (scores[i] === data.none || scores[i] < least ? -1 : scores[i]);
      for (let i = 0; i < labels.length; i++) {
        if (!required[i]) continue;
        const right = at(found, i), wrong = at(other, i), label = labels[i];
        fate[i] = wrong > right ? CLASS : right >= 0 ? RIGHT : at(off, i) >= 0 ? LOCATION : MISSED;
        counts.required[label]++;
        counts[fate[i]][label]++;
        if (fate[i] === CLASS) {
          const key = label * names.length + otherLabels[i];
          pairs.set(key, (pairs.get(key) || 0) + 1);
        }
      }
      return { fate, counts, pairs };
    });
  }

  /** [label, count] of what the objects of a class are called instead, most frequent first. */
  function calledInstead(run, label) {
    const count = names.length, found = [];
    for (const [key, number] of fates(run).pairs) if (Math.floor(key / count) === label) found.push([key % count, number]);
    return found.sort((a, b) => b[1] - a[1]);
  }

  /** Counts of verdicts of every image at the score; with a class, of boxes and objects of it alone. */
  function imageCounts(run) {
    const least = threshold(), only = state.label;
    return cached(`images ${run} ${least} ${only}`, () => {
      const { offsets, labels, scores, verdicts, truths } = runs[run].judged.boxes;
      const total = images.ids.length, { fate } = fates(run);
      const counts = new Uint16Array(total * 7), worst = new Uint16Array(total * 7), involved = new Uint8Array(total).fill(only < 0 ? 1 : 0);
      for (let image = 0; image < total; image++) {
        const first = images.offsets[image];
        for (let i = first; i < images.offsets[image + 1]; i++) {
          if (only >= 0 && images.labels[i] !== only) continue;
          involved[image] = 1;
          if (fate[i] === MISSED) counts[image * 7 + MISSED]++;
        }
        for (let i = offsets[image]; i < offsets[image + 1] && scores[i] >= least; i++) {
          const own = labels[i] === only || (truths[i] !== data.none && images.labels[first + truths[i]] === only);
          if (only >= 0 && !own) continue;
          if (verdicts[i] !== NOT_JUDGED) involved[image] = 1;
          const place = image * 7 + verdicts[i];
          counts[place]++;
          if (scores[i] > worst[place]) worst[place] = scores[i];
        }
      }
      return { counts, worst, involved };
    });
  }

  // --- charts ---

  function ticksOf(low, high, log) {
    if (log) {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) for (const part of [1, 3]) ticks.push(part * 10 ** power);
      const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
      if (inside.length > 1) return inside; // a shorter axis, as of a single bin, has ticks as others have
    }
    const rough = (high - low) / 4 || 1, unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((each) => each * unit).find((each) => each >= rough);
    const ticks = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Number(tick.toPrecision(8)));
    return ticks;
  }

  /**
   * Draw lines of runs: series of {run, points: [[x, y | null]], faint, marker, notes: [text]}.
   * The pointer, or the arrow keys, read the values off below the chart.
   */
  function chart(title, series, { x = {}, y = {}, wide = false } = {}) {
    wide &&= window.innerWidth > 640;
    const W = wide ? 640 : 330, H = wide ? 260 : 170, left = 44, right = series.some((each) => each.notes) ? 26 : 10, top = 8, bottom = x.label ? 34 : 22;
    const every = series.flatMap((each) => each.points).filter((point) => point[1] != null);
    if (!every.length) return element("figure", { class: "chart" }, element("figcaption", {}, title), element("p", { class: "muted" }, "no values"));
    const firm = series.filter((each) => !each.faint).flatMap((each) => each.points).filter((point) => point[1] != null);
    const sorted = every.map((point) => point[1]).sort((a, b) => a - b);
    const xs = every.map((point) => point[0]);
    const low = [x.min ?? xs.reduce((a, b) => Math.min(a, b)), 0], high = [x.max ?? xs.reduce((a, b) => Math.max(a, b)), 0];
    // Single peaks would flatten the rest: they are cut off at the top.
    high[1] = y.max ?? Math.max(sorted[Math.floor((sorted.length - 1) * 0.97)], firm.reduce((a, point) => Math.max(a, point[1]), -Infinity));
    low[1] = y.min ?? Math.min(0, firm.reduce((a, point) => Math.min(a, point[1]), Infinity));
    if (y.max == null) high[1] += (series.some((each) => each.notes) ? 0.12 : 0.04) * (high[1] - low[1]);
    if (high[1] === low[1]) high[1] = low[1] + 1;
    if (high[0] === low[0]) high[0] = low[0] + 1;
    const scaled = (value) => (x.log ? Math.log(value / low[0]) / Math.log(high[0] / low[0]) : (value - low[0]) / (high[0] - low[0]));
    const px = (value) => left + scaled(value) * (W - left - right);
    const py = (value) => top + (1 - (Math.min(value, high[1]) - low[1]) / (high[1] - low[1])) * (H - top - bottom);
    const format = y.format || short;
    const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title });
    for (const tick of ticksOf(low[1], high[1])) drawing.append(
      svg("line", { class: "axis", x1: left, x2: W - right, y1: py(tick), y2: py(tick) }),
      svg("text", { x: left - 5, y: py(tick) + 4, "text-anchor": "end" }, format(tick)));
    for (const tick of ticksOf(low[0], high[0], x.log)) drawing.append(
      svg("line", { class: "axis", x1: px(tick), x2: px(tick), y1: H - bottom, y2: H - bottom + 4 }),
      svg("text", { x: px(tick), y: H - bottom + 16, "text-anchor": "middle" }, tick.toLocaleString("en")));
    if (x.label) drawing.append(svg("text", { x: (W + left) / 2, y: H - 3, "text-anchor": "middle" }, x.label));
    for (const { run, points, faint, marker, notes } of series) {
      let path = "", pen = false;
      for (const [at, value] of points) {
        if (value == null) { pen = false; continue; }
        path += `${pen ? "L" : "M"}${px(at).toFixed(1)} ${py(value).toFixed(1)}`;
        pen = true;
      }
      drawing.append(svg("path", {
        d: path, fill: "none", stroke: COLORS[run % 6], "stroke-width": faint ? 1 : 2, "stroke-opacity": faint ? 0.35 : 1,
        "stroke-dasharray": faint ? null : DASHES[formOf(run)], "stroke-linejoin": "round",
      }));
      points.forEach(([at, value], i) => {
        if (!marker || value == null) return;
        drawing.append(shape(run, px(at), py(value)));
        if (notes) drawing.append(svg("text", { x: px(at), y: py(value) - 8, "text-anchor": "middle" }, notes[i]));
      });
    }
    const cursor = svg("line", { class: "axis", y1: top, y2: H - bottom, x1: -9, x2: -9, style: "stroke: var(--muted)" });
    drawing.append(cursor);
    const read = element("div", { class: "read" });
    const shown = series.filter((each) => !each.faint);
    const places = [...new Set(shown.flatMap((each) => each.points.map((point) => point[0])))].sort((a, b) => a - b);
    let place = places.length - 1;
    const readAt = (index) => {
      place = Math.max(0, Math.min(places.length - 1, index));
      const at = places[place];
      cursor.setAttribute("x1", px(at));
      cursor.setAttribute("x2", px(at));
      const values = shown.map(({ run, points }) => {
        const nearest = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a), points[0]);
        return `${letter(run)} ${nearest && nearest[1] != null ? format(nearest[1]) : "–"}`;
      });
      read.textContent = `${x.name || "step"} ${short(at)}: ${values.join("   ")}`;
    };
    drawing.setAttribute("tabindex", "0");
    drawing.addEventListener("pointermove", (event) => {
      const box = drawing.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * W;
      readAt(places.reduce((best, value, i) => (Math.abs(px(value) - at) < Math.abs(px(places[best]) - at) ? i : best), 0));
    });
    drawing.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
      if (by) { event.preventDefault(); readAt(place + by); }
    });
    return element("figure", { class: wide ? "chart wide" : "chart" }, element("figcaption", {}, title), drawing, read);
  }

  /** A marker of the run's own form. */
  function shape(run, x, y) {
    const form = formOf(run);
    const r = 4.5, style = { fill: COLORS[run % 6], stroke: "var(--panel)" };
    const paths = [
      null, `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}z`, `M${x} ${y - r - 1}l${r + 1} ${2 * r}h${-2 * r - 2}z`,
      `M${x} ${y - r - 1}l${r + 1} ${r + 1}l${-r - 1} ${r + 1}l${-r - 1} ${-r - 1}z`, `M${x - r} ${y}h${2 * r}M${x} ${y - r}v${2 * r}`, `M${x - r} ${y - r}l${2 * r} ${2 * r}m0 ${-2 * r}l${-2 * r} ${2 * r}`,
    ];
    if (form === 0) return svg("circle", { cx: x, cy: y, r, ...style });
    return svg("path", { d: paths[form], ...style, stroke: form > 3 ? COLORS[run % 6] : style.stroke, "stroke-width": form > 3 ? 2.5 : 1 });
  }

  function pager(total, size, page, turn, what) {
    const last = Math.max(0, Math.ceil(total / size) - 1);
    const step = (by, text, help) => element("button", {
      type: "button", "aria-label": `${help} of ${what}`, disabled: page + by < 0 || page + by > last, "data-turn": by, onclick: () => turn(page + by),
    }, text);
    const first = page * size;
    const text = total ? `${first + 1} to ${Math.min(total, first + size)} of ${total.toLocaleString("en")} ${what}` : `no ${what}`;
    return element("div", { class: "pager" }, step(-1, "← previous", "previous page"), step(1, "next →", "next page"), element("span", { class: "count", "aria-live": "polite" }, text));
  }

  const classLink = (label) => element("button", { type: "button", class: "link", onclick: () => choose(label) }, names[label] ?? "?");

  function choose(label, goTo = "class") {
    change({ label });
    document.getElementById(goTo)?.scrollIntoView({ block: "start" });
  }

  // --- frame ---

  const page = document.getElementById("page");
  const toc = element("nav", { class: "toc", "aria-label": "sections" });

  function section(id, title, ...children) {
    toc.append(element("a", { href: `#${id}` }, title));
    const node = element("section", { id, "aria-label": title }, element("h2", {}, title), ...children);
    page.append(node);
    return node;
  }

  function header() {
    const items = runs.map((run, place) => {
      const progress = run.finished ? `${run.steps.toLocaleString("en")} steps, finished` : `step ${run.step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}, not finished`;
      const folder = run.folder === run.name ? "" : `, ${run.folder}`;
      const missing = run.missing.map((sentence) => element("div", { class: "note missing" }, sentence));
      return element("li", {}, runMark(place), element("span", { class: "muted" }, `  ${progress}${folder}`), missing);
    });
    page.append(
      element("p", { class: "muted" }, `Written ${data.made}.`),
      element("ul", { class: "runs" }, items),
      ...data.notes.map((sentence) => element("p", { class: "note" }, sentence)),
      toc,
    );
  }

  /** Score, class and run: they hold for all sections below. */
  function toolbar() {
    const output = element("output", {}, state.score.toFixed(2));
    const slider = element("input", {
      type: "range", id: "score", min: data.floor, max: 1, step: 0.01, value: state.score,
      oninput: () => change({ score: Number(slider.value) }),
    });
    const field = element("input", {
      id: "class-filter", list: "class-names", placeholder: "all classes", autocomplete: "off", "aria-label": "class",
      onchange: () => {
        const text = field.value.trim();
        const fitting = label_of.has(text) ? [label_of.get(text)] : names.flatMap((name, label) => (text && name.toLowerCase().includes(text.toLowerCase()) ? [label] : []));
        const known = !text || fitting.length > 0;
        field.setCustomValidity(known ? "" : `no class has ${text} in its name`);
        if (known) change({ label: text ? fitting[0] : -1 });
        else field.reportValidity();
      },
      oninput: () => { field.setCustomValidity(""); if (!field.value) change({ label: -1 }); else if (label_of.has(field.value)) change({ label: label_of.get(field.value) }); },
    });
    const all = element("button", { type: "button", id: "all-classes", onclick: () => change({ label: -1 }) }, "all");
    const select = element("select", { id: "run", onchange: () => change({ run: Number(select.value) }) },
      judgedRuns.map((run) => element("option", { value: run }, `${letter(run)}  ${runs[run].name}`)));
    select.value = state.run;
    page.append(element("div", { class: "toolbar", role: "group", "aria-label": "score, class and run of what is below" },
      element("label", {}, "score ≥", slider, output),
      judgedRuns.length > 1 ? element("label", {}, "run", select) : null,
      element("label", {}, "class", field), all,
      element("datalist", { id: "class-names" }, names.map((name) => element("option", { value: name })))));
    follow(["score", "label", "run"], () => {
      output.textContent = state.score.toFixed(2);
      if (document.activeElement !== field || state.label < 0 || label_of.get(field.value) !== state.label) field.value = state.label < 0 ? "" : names[state.label];
      all.disabled = state.label < 0;
    });
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, dialog")) return;
      if (event.key === "/") { event.preventDefault(); field.focus(); field.select(); }
      const turn = { "[": -1, "]": 1 }[event.key];
      if (turn) document.querySelector(`#images .pager button[data-turn="${turn}"]`)?.click();
    });
  }

  // --- sections ---

  function summary() {
    const known = ["AP", "APr", "APc", "APf", "AP50", "AP75", "APs", "APm", "APl"];
    const recalls = runs.flatMap((run) => Object.keys(run.figures || {})).filter((name) => name.startsWith("AR@"));
    const columns = [...known, ...new Set(recalls)];
    const rows = runs.flatMap((run, place) => [
      element("tr", {}, element("th", { scope: "row" }, runMark(place, false), ` ${run.name}${run.evaluatedStep == null ? "" : ` (step ${run.evaluatedStep})`}`),
        columns.map((name) => element("td", { class: "n" }, run.figures ? percent(run.figures[name]) : "–"))),
      run.paper ? element("tr", { class: "paper" }, element("th", { scope: "row" }, element("i", {}, `${letter(place)}: the paper's figures`)),
        columns.map((name) => element("td", { class: "n" }, element("i", {}, run.paper[name] == null ? "" : run.paper[name].toFixed(1))))) : null,
    ]).filter(Boolean);
    section("summary", "Summary",
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "run"), columns.map((name) => element("th", { class: "n" }, name)))), element("tbody", {}, rows))),
      element("p", { class: "muted" }, "Percent; – is undefined or not computed (AR@N: with N detections per image). r, c, f: rare, common and frequent classes (1 to 10, 11 to 100, more training images); s, m, l: small, medium and large objects."));
  }

  function curves() {
    const fields = [...new Set(runs.flatMap((run) => Object.keys(run.curves.fields).slice(0, run.curves.losses)))];
    const others = [...new Set(runs.flatMap((run) => Object.keys(run.curves.fields)))].filter((name) => !fields.includes(name));
    if (!fields.length && !others.length) return;
    const last = Math.max(...runs.map((run) => run.steps));
    const one = (name) => chart(name, runs.flatMap((run, place) => {
      const field = run.curves.fields[name];
      if (!field) return [];
      const points = (values) => values.map((value, i) => [run.curves.steps[i], value]);
      return [{ run: place, points: points(field.raw), faint: true }, { run: place, points: points(field.smooth) }];
    }), { x: { min: 0, max: last } });
    const evaluated = runs.map((run, place) => {
      const points = run.evaluations.map((each) => [each.step, each.AP < 0 ? null : each.AP]);
      return { run: place, points, marker: true };
    });
    const more = element("details", {}, element("summary", {}, `${others.length} more: learning rate, gradient norm, speed, counts`));
    more.addEventListener("toggle", () => { if (more.open && !more.querySelector(".charts")) more.append(element("div", { class: "charts" }, others.map(one))); });
    section("curves", "Training",
      element("p", { class: "muted" }, "Faint: as logged; on top: running mean over a twentieth of the log. The axis is the whole training, from step 0. Single peaks are cut off at the top."),
      element("div", { class: "charts" },
        evaluated.some((each) => each.points.length > 1) ? chart("AP on the way", evaluated, { x: { min: 0, max: last }, y: { format: percent } }) : null,
        fields.map(one)),
      others.length ? more : null);
  }

  function longTail() {
    const judged = judgedRuns.filter((run) => runs[run].judged.bins.length);
    const withFigures = runs.map((_, run) => run).filter((run) => runs[run].figures);
    if (!withFigures.length) return;
    const figure = (run, name) => runs[run].figures[name] ?? -1; // an eval.json may have AP alone
    const most = Math.max(...withFigures.flatMap((run) => ["AP", "APr", "APc", "APf"].map((name) => figure(run, name))), 0.01);
    const bars = element("div", { class: "bars", role: "group", "aria-label": "AP by frequency" });
    for (const [name, title] of [["AP", "all"], ["APr", "rare"], ["APc", "common"], ["APf", "frequent"]]) {
      withFigures.forEach((run, place) => bars.append(
        element("span", { class: "group" }, place ? "" : title), element("span", {}, letter(run)),
        element("span", { class: "bar" }, element("i", { style: `width:${Math.max(0, (70 * figure(run, name)) / most)}%;background:${COLORS[run % 6]}` }), percent(figure(run, name)))));
      bars.append(element("span", { class: "group-gap" }));
    }
    const series = judged.map((run, place) => ({
      run, marker: true, points: runs[run].judged.bins.map(([first, last, , ap]) => [Math.sqrt(Math.max(first, 1) * Math.max(last, 1)), ap]),
      notes: place ? null : runs[run].judged.bins.map((bin) => `n=${bin[2]}`),
    }));
    section("long-tail", "AP along the long tail", bars,
      series.length ? [chart("AP against training images of the class (n: classes in the bin, at least three)", series, { wide: true, x: { log: true, label: "training images of the class", name: "images" }, y: { format: percent, min: 0 } })] : null);
  }

  function classTable() {
    const view = { page: 0, sort: "ap" + (judgedRuns[0] ?? ""), up: true, text: "", group: "" };
    const columns = [
      { key: "name", title: "class", value: (label) => names[label], text: true },
      { key: "group", title: "group", value: (label) => "rcf".indexOf(classes.frequencies[label]), show: (label) => GROUP_NAMES[classes.frequencies[label]] },
      ...judgedRuns.map((run) => ({ key: `ap${run}`, title: judgedRuns.length > 1 ? `AP ${letter(run)}` : "AP", value: (label) => runs[run].judged.ap[label], show: (label) => percent(runs[run].judged.ap[label]) })),
      { key: "train", title: "training images", value: (label) => classes.trainImages[label] },
      { key: "instances", title: "training instances", value: (label) => classes.trainInstances[label] },
      ...(classes.imageLevel ? [{ key: "level", title: "image-level images", value: (label) => classes.imageLevel[label] }] : []),
      ...(data.regions ? [{ key: "region", title: "mean region score", value: (label) => data.regions.means[label], show: (label) => (data.regions.means[label] < 0 ? "–" : short(data.regions.means[label])) }] : []),
      { key: "val", title: "val instances", value: (label) => classes.valInstances[label] },
      ...(judgedRuns.length ? [
        { key: "right", title: "right", live: true, value: (label) => fates(state.run).counts[RIGHT][label] },
        { key: "called", title: "called another class", live: true, value: (label) => fates(state.run).counts[CLASS][label], show: (label) => called(label) },
        { key: "off", title: "box off", live: true, value: (label) => fates(state.run).counts[LOCATION][label] },
        { key: "missed", title: "missed", live: true, value: (label) => fates(state.run).counts[MISSED][label] },
      ] : []),
    ];
    const called = (label) => {
      const count = fates(state.run).counts[CLASS][label];
      if (!count) return "0";
      const [[name, most]] = calledInstead(state.run, label);
      return `${count} (${names[name]} ${most})`;
    };
    const search = element("input", { type: "search", id: "class-search", placeholder: "part of a name", "aria-label": "search classes", oninput: () => { view.text = search.value.toLowerCase(); view.page = 0; draw(); } });
    const group = element("select", { id: "class-group", onchange: () => { view.group = group.value; view.page = 0; draw(); } },
      [["", "all groups"], ["r", "rare"], ["c", "common"], ["f", "frequent"]].map(([value, text]) => element("option", { value }, text)));
    const place = element("div");
    const draw = () => {
      const column = columns.find((each) => each.key === view.sort) || columns[0];
      const rows = names.map((_, label) => label).filter((label) => (!view.group || classes.frequencies[label] === view.group) && names[label].toLowerCase().includes(view.text));
      const sign = view.up ? 1 : -1;
      const undefinedLast = (value) => (typeof value === "number" && value < 0 ? 1 : 0); // classes without objects are at the end either way
      rows.sort((a, b) => {
        const [x, y] = [column.value(a), column.value(b)];
        return undefinedLast(x) - undefinedLast(y) || sign * (column.text ? x.localeCompare(y) : x - y) || classes.trainImages[a] - classes.trainImages[b] || a - b;
      });
      const size = PAGE_SIZES.classes;
      view.page = Math.min(view.page, Math.max(0, Math.ceil(rows.length / size) - 1));
      const head = columns.map((each) => element("th", { scope: "col", class: each.text ? "" : "n", "aria-sort": each.key === view.sort ? (view.up ? "ascending" : "descending") : "none" },
        element("button", { type: "button", "data-sort": each.key, onclick: () => { view.up = each.key === view.sort ? !view.up : Boolean(each.text) || each.key === "group" || each.key.startsWith("ap") || each.key === "train"; view.sort = each.key; view.page = 0; draw(); place.querySelector(`[data-sort="${each.key}"]`).focus(); } }, each.title)));
      const body = rows.slice(view.page * size, (view.page + 1) * size).map((label) => element("tr", { class: label === state.label ? "chosen" : "" },
        columns.map((each) => each.text ? element("td", {}, classLink(label)) : element("td", { class: "n" }, each.show ? each.show(label) : each.value(label).toLocaleString("en")))));
      clear(place, element("div", { class: "scroll" }, element("table", { class: "classes" }, element("thead", {}, element("tr", {}, head)), element("tbody", {}, body))),
        pager(rows.length, size, view.page, (to) => { view.page = to; draw(); }, "classes"));
    };
    section("classes", "Classes",
      element("p", { class: "muted" }, "Choose a column to sort, a class to see why. ", judgedRuns.length ? "The last four columns count the objects of the class at the score above, for the chosen run: the box with the highest score on an object decides." : ""),
      element("div", { class: "controls" }, element("label", {}, "search", search), element("label", {}, "group", group)), place);
    follow(["score", "run", "label"], draw);
  }

  /** Why one class fails: what happens to its objects, what its boxes are, its curve and its regions. */
  function oneClass() {
    const place = element("div");
    section("class", "One class", place);
    follow(["score", "label"], () => {
      if (state.label < 0) {
        clear(place, element("p", { class: "muted" }, "Choose a class in the table above, or type its name into the field on top (key ", element("kbd", {}, "/"), ")."));
        return;
      }
      const label = state.label, facts = [
        [GROUP_NAMES[classes.frequencies[label]], "group"], [classes.trainImages[label], "training images"], [classes.trainInstances[label], "training instances"],
        classes.imageLevel ? [classes.imageLevel[label], "image-level images"] : null,
        data.regions && data.regions.means[label] >= 0 ? [short(data.regions.means[label]), "mean score of its regions"] : null,
        data.regions && data.regions.fallbacks[label] ? [data.regions.fallbacks[label], "regions that no detection gave"] : null,
        [classes.valImages[label], "val images"], [classes.valInstances[label], "val instances"],
      ].filter(Boolean);
      clear(place, element("h3", { class: "chosen-class" }, names[label]),
        element("ul", { class: "facts" }, facts.map(([value, text]) => element("li", {}, element("b", {}, value.toLocaleString("en")), element("span", {}, text)))),
        element("div", { class: "controls" },
          judgedRuns.length ? element("button", { type: "button", onclick: () => choose(label, "images") }, "its images") : null,
          data.regions ? element("button", { type: "button", onclick: () => choose(label, "regions") }, "its regions") : null),
        judgedRuns.map((run) => whyOf(run, label)),
        judgedRuns.length ? element("div", { class: "charts" }, precisionChart(label)) : null);
    });
  }

  function whyOf(run, label) {
    const { counts } = fates(run), total = counts.required[label];
    const parts = [[RIGHT, "right"], [CLASS, "called another class"], [LOCATION, "box off"], [MISSED, "missed"]].filter(([kind]) => counts[kind][label]);
    const shares = parts.map(([kind, text]) => element("span", { style: `flex: ${counts[kind][label]} 1 0; border-bottom: 5px solid ${VERDICTS[kind].color}`, title: `${counts[kind][label]} ${text}` },
      `${VERDICTS[kind].sign} ${counts[kind][label]}`));
    const told = parts.map(([kind, text]) => `${VERDICTS[kind].sign} ${counts[kind][label]} ${text}`).join(", ");
    const instead = calledInstead(run, label).slice(0, 6).flatMap(([other, number], i) => [i ? ", " : "", classLink(other), ` ${number}`]);
    const boxes = boxesNamed(run, label);
    const really = boxes.really.slice(0, 6).flatMap(([other, number], i) => [i ? ", " : "", classLink(other), ` ${number}`]);
    const list = [RIGHT, CLASS, LOCATION, DUPLICATE, NOTHING, NOT_JUDGED].filter((kind) => boxes.counts[kind]).map((kind) => `${boxes.counts[kind]} ${VERDICTS[kind].name}`).join(", ");
    return element("div", { class: "why" },
      element("h3", {}, runMark(run), `: AP ${percent(runs[run].judged.ap[label])}, AP50 ${percent(runs[run].judged.ap50[label])}, recall at any score ${percent(runs[run].judged.recall50[label])}`),
      element("p", {}, total ? `Its ${plural(total, "object")} at score ${state.score.toFixed(2)}: ${told}.` : "It has no object in this split that counts."),
      total ? element("div", { class: "fates" }, shares) : null,
      instead.length ? element("p", {}, "Called instead: ", ...instead, ".") : null,
      element("p", {}, list ? `Boxes with this name: ${list}.` : "No box with this name has this score.", ...(really.length ? [" Those of the wrong class are really: ", ...really, "."] : [])));
  }

  /** Verdicts of the embedded boxes of a class at the score, and what those of the wrong class are on. */
  function boxesNamed(run, label) {
    const least = threshold(), { offsets, labels, scores, verdicts, truths } = runs[run].judged.boxes;
    const counts = new Uint32Array(7), really = new Map();
    for (let image = 0; image < images.ids.length; image++) {
      for (let i = offsets[image]; i < offsets[image + 1] && scores[i] >= least; i++) {
        if (labels[i] !== label) continue;
        counts[verdicts[i]]++;
        if (verdicts[i] === CLASS) {
          const other = images.labels[images.offsets[image] + truths[i]];
          really.set(other, (really.get(other) || 0) + 1);
        }
      }
    }
    return { counts, really: [...really].sort((a, b) => b[1] - a[1]) };
  }

  function precisionChart(label) {
    const series = judgedRuns.filter((run) => runs[run].judged.ap[label] >= 0).map((run) => ({
      run, points: Array.from({ length: 101 }, (_, i) => [i / 100, runs[run].judged.precision[label * 101 + i] / 255]),
    }));
    return chart(`${names[label]}: precision over recall, IoU 0.5`, series, { x: { min: 0, max: 1, label: "recall", name: "recall" }, y: { min: 0, max: 1 } });
  }

  function precisionRecall() {
    const rated = names.map((_, label) => label).filter((label) => runs[judgedRuns[0]].judged.ap[label] >= 0);
    const ap = runs[judgedRuns[0]].judged.ap;
    const chosen = ["r", "c", "f"].map((group) => rated.filter((label) => classes.frequencies[label] === group).sort((a, b) => ap[a] - ap[b])[0]).filter((label) => label != null);
    const field = element("input", {
      list: "class-names", id: "curve-class", placeholder: "add a class", "aria-label": "add a class", autocomplete: "off",
      onchange: () => { const label = label_of.get(field.value); if (label != null) { if (!chosen.includes(label)) chosen.unshift(label); field.value = ""; draw(); } },
    });
    const place = element("div", { class: "charts" });
    const draw = () => clear(place, chosen.map((label) => {
      const figure = precisionChart(label);
      figure.append(element("button", { type: "button", "aria-label": `remove ${names[label]}`, onclick: () => { chosen.splice(chosen.indexOf(label), 1); draw(); } }, "remove"));
      return figure;
    }));
    section("precision", "Precision and recall", element("p", { class: "muted" }, "To begin with, the class with the lowest AP of each group, and every class that you choose."),
      element("div", { class: "controls" }, element("label", {}, "class", field)), place);
    draw();
    follow(["label"], () => { if (state.label >= 0 && !chosen.includes(state.label)) { chosen.unshift(state.label); draw(); } });
  }

  // --- confusion ---

  function confusion() {
    const view = { page: 0, zoom: 0, x: 0, y: 0, row: 0, column: 0 };
    const pairs = element("div"), read = element("p", { class: "read", "aria-live": "polite" });
    const side = Math.max(360, Math.min(800, window.innerWidth - 40));
    const canvas = element("canvas", { id: "matrix", width: side, height: side, tabindex: 0, role: "img", "aria-label": "confusion of classes; arrow keys move, Enter chooses, + and - zoom" });
    const counts = runs[judgedRuns[0]] && fates(judgedRuns[0]).counts.required;
    const order = names.map((_, label) => label).filter((label) => counts[label]).sort((a, b) => classes.trainImages[b] - classes.trainImages[a] || a - b);
    const rank = new Map(order.map((label, place) => [label, place]));
    const named = 12, edge = Math.round(0.16 * side); // cells of at least so many pixels have names, along an edge of this width
    const gutter = () => (view.zoom >= named ? edge : 0);
    const fit = () => ((canvas.width - edge) / order.length >= named ? (canvas.width - edge) / order.length : canvas.width / order.length);
    const extent = () => (canvas.width - gutter()) / view.zoom;
    const setZoom = (factor, at = [view.column + 0.5, view.row + 0.5]) => {
      const before = view.zoom, zoom = Math.max(fit(), Math.min(Math.max(80, 4 * fit()), before * factor));
      const [px, py] = [(at[0] - view.x) * before, (at[1] - view.y) * before];
      view.zoom = zoom;
      move(at[0] - px / zoom, at[1] - py / zoom);
    };
    const move = (x, y) => {
      const shown = extent();
      view.x = Math.max(0, Math.min(order.length - shown, x));
      view.y = Math.max(0, Math.min(order.length - shown, y));
      draw();
    };
    const draw = () => {
      const context = canvas.getContext("2d"), style = getComputedStyle(document.body), z = view.zoom, found = fates(state.run), g = gutter();
      context.fillStyle = style.getPropertyValue("--ground");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.save();
      context.beginPath();
      context.rect(g, g, canvas.width - g, canvas.height - g);
      context.clip();
      context.translate(g, g);
      const cell = (row, column, share, color) => {
        context.globalAlpha = Math.min(1, 0.12 + 0.88 * Math.sqrt(share));
        context.fillStyle = color;
        context.fillRect((column - view.x) * z, (row - view.y) * z, Math.max(1.5, z - (z > 6 ? 1 : 0)), Math.max(1.5, z - (z > 6 ? 1 : 0)));
      };
      order.forEach((label, place) => { const share = found.counts[RIGHT][label] / found.counts.required[label]; if (share) cell(place, place, share, style.getPropertyValue("--good")); });
      for (const [key, number] of found.pairs) {
        const label = Math.floor(key / names.length), column = rank.get(key % names.length);
        if (column != null) cell(rank.get(label), column, number / found.counts.required[label], style.getPropertyValue("--ink"));
      }
      context.globalAlpha = 1;
      context.strokeStyle = style.getPropertyValue("--accent");
      context.lineWidth = 3;
      context.strokeRect((view.column - view.x) * z - 1, (view.row - view.y) * z - 1, Math.max(z, 8) + 2, Math.max(z, 8) + 2);
      context.restore();
      if (g) {
        context.font = `${Math.min(17, z * 0.8)}px system-ui, "Noto Sans", sans-serif`;
        context.textAlign = "right";
        context.fillStyle = style.getPropertyValue("--ink");
        const shown = (from) => order.map((label, place) => [label, (place + 0.5 - from) * z + g]).filter(([, at]) => at > g && at < canvas.width);
        for (const [label, at] of shown(view.y)) context.fillText(names[label], g - 6, at + z * 0.27, g - 8);
        for (const [label, at] of shown(view.x)) {
          context.save();
          context.translate(at + z * 0.27, g - 6);
          context.rotate(-Math.PI / 2);
          context.textAlign = "left";
          context.fillText(names[label], 0, 0, g - 8);
          context.restore();
        }
      }
      const row = order[view.row], column = order[view.column];
      const number = row === column ? found.counts[RIGHT][row] : found.pairs.get(row * names.length + column) || 0;
      read.textContent = row === column ? `${names[row]}: ${number} of ${found.counts.required[row]} right` : `${names[row]} called ${names[column]}: ${number} of ${found.counts.required[row]}`;
    };
    const keep = () => { // the cursor stays in sight
      const shown = extent(), within = (from, place) => Math.min(place, Math.max(from, place + 1 - shown));
      move(within(view.x, view.column), within(view.y, view.row));
    };
    const placeOf = (event) => {
      const box = canvas.getBoundingClientRect(), unit = canvas.width / box.width / view.zoom;
      const edge = gutter() / view.zoom;
      return [view.x + (event.clientX - box.left) * unit - edge, view.y + (event.clientY - box.top) * unit - edge];
    };
    const pointAt = (event) => {
      const [x, y] = placeOf(event);
      view.column = Math.max(0, Math.min(order.length - 1, Math.floor(x)));
      view.row = Math.max(0, Math.min(order.length - 1, Math.floor(y)));
    };
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => { drag = { from: [event.clientX, event.clientY], x: view.x, y: view.y, moved: false }; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) { pointAt(event); draw(); return; }
      const unit = canvas.width / canvas.getBoundingClientRect().width / view.zoom;
      const [dx, dy] = [event.clientX - drag.from[0], event.clientY - drag.from[1]];
      drag.moved ||= Math.hypot(dx, dy) > 5;
      if (drag.moved) move(drag.x - dx * unit, drag.y - dy * unit);
    });
    canvas.addEventListener("pointerup", (event) => { if (drag && !drag.moved) { pointAt(event); draw(); } drag = null; });
    canvas.addEventListener("dblclick", (event) => setZoom(2, placeOf(event)));
    canvas.addEventListener("wheel", (event) => { if (!event.ctrlKey && !event.shiftKey) return; event.preventDefault(); setZoom(event.deltaY < 0 ? 1.25 : 0.8, placeOf(event)); }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (step) {
        view.column = Math.max(0, Math.min(order.length - 1, view.column + step[0]));
        view.row = Math.max(0, Math.min(order.length - 1, view.row + step[1]));
        keep();
      } else if (event.key === "+" || event.key === "=") setZoom(1.5);
      else if (event.key === "-") setZoom(1 / 1.5);
      else if (event.key === "0") setZoom(0);
      else if (event.key === "Enter") choose(order[view.row]);
      else return;
      event.preventDefault();
    });
    const show = (row, column) => { view.row = row; view.column = column; view.zoom = Math.max(view.zoom, Math.min(40, 16 * fit())); move(column - extent() / 2, row - extent() / 2); };
    const drawPairs = () => {
      const found = fates(state.run), size = PAGE_SIZES.pairs;
      const sorted = [...found.pairs].map(([key, number]) => [Math.floor(key / names.length), key % names.length, number])
        .filter(([from, to]) => state.label < 0 || from === state.label || to === state.label)
        .sort((a, b) => b[2] - a[2] || b[2] / found.counts.required[b[0]] - a[2] / found.counts.required[a[0]]);
      view.page = Math.min(view.page, Math.max(0, Math.ceil(sorted.length / size) - 1));
      const rows = sorted.slice(view.page * size, (view.page + 1) * size).map(([from, to, number]) => element("tr", {},
        element("td", {}, classLink(from)), element("td", {}, classLink(to)), element("td", { class: "n" }, `${number} of ${found.counts.required[from]}`),
        element("td", {}, rank.has(to) ? element("button", { type: "button", class: "link", onclick: () => { show(rank.get(from), rank.get(to)); canvas.focus(); } }, "matrix") : "")));
      clear(pairs, element("div", { class: "scroll" }, element("table", { class: "pairs" }, element("thead", {}, element("tr", {}, element("th", {}, "object"), element("th", {}, "called"), element("th", { class: "n" }, "objects"), element("th", {}, ""))), element("tbody", {}, rows))),
        pager(sorted.length, size, view.page, (to) => { view.page = to; drawPairs(); }, "pairs"));
    };
    section("confusion", "Confusion of classes",
      element("p", { class: "muted" }, "Objects whose highest-scoring box (IoU of at least 0.5) has another class, at the score above, for the chosen run.", data.federated ? " In federated annotation, only classes that are verified in the image count." : ""),
      pairs,
      element("p", { class: "muted" }, "Rows: what it is; columns: what it is called; from frequent to rare classes. Darker: a larger share of the row. The diagonal is what is right. Drag to move; zoom with the buttons, a double click or Ctrl and the wheel; with the keyboard: arrows, ", element("kbd", {}, "+"), " ", element("kbd", {}, "-"), " ", element("kbd", {}, "0"), ", Enter for the class."),
      element("div", { class: "controls" },
        element("button", { type: "button", onclick: () => setZoom(1.5), "aria-label": "zoom in" }, "+"), element("button", { type: "button", onclick: () => setZoom(1 / 1.5), "aria-label": "zoom out" }, "−"),
        element("button", { type: "button", onclick: () => setZoom(0) }, "whole")),
      element("div", { class: "matrix" }, canvas), read);
    view.zoom = fit();
    follow(["score", "run", "label"], drawPairs);
    follow(["score", "run"], draw);
    follow(["label"], () => { const row = rank.get(state.label); if (row != null) { view.row = view.column = row; keep(); } });
    schemeListeners.push(draw);
  }

  function errors() {
    const help = {
      class: "wrong class", location: "box off (IoU 0.1 to 0.5)", both: "wrong class and box off", duplicate: "duplicate", background: "nothing there", missed: "missed",
    };
    const view = { group: "all" };
    const place = element("div"), select = element("select", { id: "error-group", onchange: () => { view.group = select.value; draw(); } }, data.groups.map((group) => element("option", { value: group }, GROUP_NAMES[group])));
    const draw = () => {
      const most = Math.max(0.001, ...judgedRuns.flatMap((run) => data.errors.map((name) => runs[run].judged.errors.lost[name][view.group])));
      const bars = element("div", { class: "bars" });
      for (const name of data.errors) {
        judgedRuns.forEach((run, i) => {
          const { lost, counts } = runs[run].judged.errors, value = lost[name][view.group];
          bars.append(element("span", { class: "group" }, i ? "" : help[name]), element("span", {}, letter(run)),
            element("span", { class: "bar" }, element("i", { style: `width:${Math.max(0, (60 * value) / most)}%;background:${COLORS[run % 6]}` }), signed(value), element("span", { class: "muted" }, view.group === "all" ? `(${counts[name].toLocaleString("en")})` : "")));
        });
        bars.append(element("span", { class: "group-gap" }));
      }
      clear(place, element("p", {}, judgedRuns.map((run) => `${letter(run)}: AP50 ${percent(runs[run].judged.errors.ap50[view.group])}`).join("   ")), bars);
    };
    section("errors", "Shares of errors",
      element("p", { class: "muted" }, "How far AP50 would rise if one kind of error alone were corrected (TIDE, arXiv 2008.08115), at all scores; in brackets how many there are."),
      element("div", { class: "controls" }, element("label", {}, "classes", select)), place);
    draw();
  }

  // --- images ---

  const loaded = new Map();
  /** Give the picture of an image to `use`, once it is decoded; null where the page has none. */
  function withPicture(source, use) {
    if (!source) { use(null); return; }
    let picture = loaded.get(source);
    if (!picture) {
      picture = new Image();
      picture.src = `data:image/jpeg;base64,${source}`;
      if (loaded.size > 120) loaded.clear();
      loaded.set(source, picture);
    }
    if (picture.complete && picture.naturalWidth) use(picture);
    else picture.addEventListener("load", () => use(picture));
  }

  const shown = { verdicts: new Set([RIGHT, CLASS, LOCATION, DUPLICATE, NOTHING, MISSED]) };

  /** What a pane of an image has: boxes {corners, label, score, verdict, truth}; of run -1 the ground truth. */
  function boxesOf(image, run) {
    const first = images.offsets[image], last = images.offsets[image + 1], boxes = [];
    const truth = (i, verdict) => ({ corners: images.corners.subarray(4 * i, 4 * i + 4), label: images.labels[i], score: null, verdict, truth: images.labels[i] });
    if (run < 0) {
      for (let i = first; i < last; i++) boxes.push(truth(i, -1));
      return boxes;
    }
    const { offsets, labels, scores, verdicts, truths, corners } = runs[run].judged.boxes, least = threshold(), { fate } = fates(run);
    for (let i = offsets[image]; i < offsets[image + 1] && scores[i] >= least; i++) boxes.push({
      corners: corners.subarray(4 * i, 4 * i + 4), label: labels[i], score: scores[i] / data.units, verdict: verdicts[i], truth: truths[i] === data.none ? -1 : images.labels[first + truths[i]],
    });
    for (let i = first; i < last; i++) if (fate[i] === MISSED) boxes.push(truth(i, MISSED));
    return boxes.filter((box) => shown.verdicts.has(box.verdict));
  }

  const involves = (box) => state.label < 0 || box.label === state.label || box.truth === state.label;

  /** Draw at the size that the canvas has in the page, so that lines and names keep theirs. */
  function drawPane(canvas, image, boxes) {
    const unit = window.devicePixelRatio || 1, width = Math.round((canvas.clientWidth || 300) * unit);
    const [height0, width0] = [images.sizes[2 * image], images.sizes[2 * image + 1]];
    canvas.width = width;
    canvas.height = Math.max(40, Math.min(2 * width, Math.round((width * height0) / width0)));
    const paint = (picture) => {
      const context = canvas.getContext("2d"), style = getComputedStyle(document.body);
      context.fillStyle = style.getPropertyValue("--shade");
      context.fillRect(0, 0, canvas.width, canvas.height);
      if (picture) { context.imageSmoothingQuality = "high"; context.drawImage(picture, 0, 0, canvas.width, canvas.height); }
      const crowded = boxes.length > (width > 500 * unit ? 40 : 12);
      const placed = [];
      for (const box of [...boxes].sort((a, b) => Number(involves(a)) - Number(involves(b)) || (a.verdict === RIGHT ? -1 : 0) - (b.verdict === RIGHT ? -1 : 0))) {
        const kind = VERDICTS[box.verdict] || { color: "#1b1f24", dash: [], width: 1.6, sign: "" };
        const [x1, y1, x2, y2] = Array.from(box.corners, (value, i) => (value / 65535) * (i % 2 ? canvas.height : canvas.width));
        const mine = involves(box);
        context.globalAlpha = mine ? 1 : 0.4;
        context.setLineDash([]);
        context.strokeStyle = "#fff";
        context.lineWidth = (kind.width + 2) * unit;
        context.strokeRect(x1, y1, x2 - x1, y2 - y1);
        context.setLineDash(kind.dash.map((each) => each * unit));
        context.strokeStyle = kind.color;
        context.lineWidth = kind.width * unit;
        context.strokeRect(x1, y1, x2 - x1, y2 - y1);
        context.setLineDash([]);
        if (mine && (!crowded || box.verdict > RIGHT)) placed.push({ x: x1, y: y1, bottom: y2, text: `${kind.sign} ${names[box.label] ?? "?"}${box.score == null ? "" : ` ${box.score.toFixed(2)}`}`.trim(), color: kind.color });
      }
      context.globalAlpha = 1;
      context.font = `600 ${11 * unit}px system-ui, "Noto Sans", sans-serif`;
      const taken = [], line = 14 * unit;
      for (const each of placed.reverse()) { // the most important first, so that it keeps its place
        const wide = Math.min(canvas.width, context.measureText(each.text).width + 6 * unit), x = Math.max(0, Math.min(each.x, canvas.width - wide));
        const spots = [each.y - line, each.y, each.bottom - line, each.bottom, each.y + line].map((y) => Math.max(0, Math.min(y, canvas.height - line)));
        const free = spots.find((y) => taken.every((other) => x + wide <= other.x || other.x + other.wide <= x || y + line <= other.y || other.y + line <= y));
        if (free == null && placed.length > 6) continue;
        const y = free ?? spots[0];
        taken.push({ x, y, wide });
        context.fillStyle = each.color;
        context.fillRect(x, y, wide, line);
        context.fillStyle = "#fff";
        context.fillText(each.text, x + 3 * unit, y + 10.5 * unit, wide - 4 * unit);
      }
    };
    paint(null);
    const source = images.pictures[image];
    if (source) withPicture(source, paint);
  }

  function summaryOf(boxes) {
    const counts = [RIGHT, ...MISTAKES, NOT_JUDGED].map((kind) => [kind, boxes.filter((box) => box.verdict === kind && involves(box)).length]).filter(([, count]) => count);
    return counts.map(([kind, count]) => `${VERDICTS[kind].sign} ${count} ${VERDICTS[kind].name}`).join(", ") || "no box";
  }

  /** The panes of an image; `drawPanes` draws them once they are in the page. */
  function panes(image) {
    return element("div", { class: "panes" }, [-1, ...judgedRuns].map((run) => {
      const boxes = boxesOf(image, run), canvas = element("canvas", { role: "img" });
      const text = run < 0 ? plural(boxes.length, "object") : summaryOf(boxes);
      canvas.setAttribute("aria-label", `${run < 0 ? "ground truth" : runs[run].name}: ${text}`);
      canvas.draw = () => drawPane(canvas, image, boxes);
      return element("div", { class: "pane", "data-run": run }, canvas, element("p", {}, element("b", {}, run < 0 ? "truth" : judgedRuns.length > 1 ? letter(run) : "run"), ` ${text}`));
    }));
  }

  const drawPanes = (node) => node.querySelectorAll("canvas").forEach((canvas) => canvas.draw());

  const dialog = element("dialog", { "aria-label": "image" });
  /** Show an image of a list, and with the arrow keys those before and after it. */
  function enlarge(list, place) {
    const image = list[place];
    dialog.onkeydown = (event) => {
      const to = place + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] || 0);
      if (to !== place && to in list) { event.preventDefault(); enlarge(list, to); }
    };
    const rows = judgedRuns.flatMap((run) => boxesOf(image, run).map((box) => element("tr", {}, element("td", {}, letter(run)),
      element("td", {}, `${VERDICTS[box.verdict].sign} ${VERDICTS[box.verdict].name}`), element("td", {}, names[box.label] ?? "?"), element("td", { class: "n" }, box.score == null ? "" : box.score.toFixed(3)),
      element("td", {}, box.truth >= 0 && box.truth !== box.label ? names[box.truth] : ""))));
    clear(dialog, element("form", { method: "dialog", class: "controls" }, element("h3", {}, `image ${images.ids[image]}: ${images.files[image]}`), element("button", { autofocus: true }, "close"), element("span", { class: "muted" }, `${place + 1} of ${list.length}; ← and → turn`)),
      panes(image),
      element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ["run", "verdict", "box says", "score", "it is"].map((text) => element("th", {}, text)))), element("tbody", {}, rows))));
    if (dialog.open) dialog.querySelector("button").focus();
    else dialog.showModal();
    drawPanes(dialog);
  }

  function verdictMark(kind) {
    const { color, dash, width } = VERDICTS[kind];
    return svg("svg", { width: 26, height: 14, "aria-hidden": "true" }, svg("rect", { x: 2, y: 2, width: 22, height: 10, fill: "none", stroke: color, "stroke-width": width, "stroke-dasharray": dash.join(" ") }));
  }

  function imageSection() {
    const view = { page: 0, sort: "worst", pictures: false };
    const grid = element("div", { class: "cards" }), turning = element("div");
    grid.style.setProperty("--card", `${Math.max(27, Math.min(60, 12 * (1 + judgedRuns.length)))}rem`);
    const boxes = [RIGHT, ...MISTAKES, ...(data.federated ? [NOT_JUDGED] : [])].map((kind) => element("label", { title: VERDICTS[kind].help },
      element("input", { type: "checkbox", name: "verdict", value: kind, checked: shown.verdicts.has(kind), onchange: (event) => { shown.verdicts[event.target.checked ? "add" : "delete"](kind); view.page = 0; draw(); } }),
      verdictMark(kind), `${VERDICTS[kind].sign} ${VERDICTS[kind].name}`));
    const sorts = [["worst", "most confident mistake"], ["mistakes", "most mistakes"], ["missed", "most missed"], ["file", "order of the file"], ...(judgedRuns.length > 1 ? [["differ", "runs differ most"]] : [])];
    const sort = element("select", { id: "image-sort", onchange: () => { view.sort = sort.value; view.page = 0; draw(); } }, sorts.map(([value, text]) => element("option", { value }, text)));
    const withPictures = Object.keys(images.pictures).length;
    const only = element("input", { type: "checkbox", id: "only-pictures", onchange: () => { view.pictures = only.checked; view.page = 0; draw(); } });

    const ordered = () => {
      const { counts, worst, involved } = imageCounts(state.run), total = images.ids.length;
      const kinds = MISTAKES.filter((kind) => shown.verdicts.has(kind));
      const highest = new Float64Array(total), wrong = new Float64Array(total), list = [];
      for (let image = 0; image < total; image++) {
        if (!involved[image] || (view.pictures && !images.pictures[image])) continue;
        let any = [RIGHT, ...MISTAKES].every((kind) => shown.verdicts.has(kind)); // no filter: images without any box are shown too
        for (const kind of shown.verdicts) if (counts[image * 7 + kind]) any = true;
        if (!any) continue;
        for (const kind of kinds) {
          wrong[image] += counts[image * 7 + kind];
          if (worst[image * 7 + kind] > highest[image]) highest[image] = worst[image * 7 + kind];
        }
        list.push(image);
      }
      const missed = (image) => (shown.verdicts.has(MISSED) ? counts[image * 7 + MISSED] : 0);
      const rank = {
        worst: (a, b) => highest[b] - highest[a] || wrong[b] - wrong[a],
        mistakes: (a, b) => wrong[b] - wrong[a] || highest[b] - highest[a],
        missed: (a, b) => missed(b) - missed(a) || wrong[b] - wrong[a],
        file: () => 0,
        differ: (a, b) => differences()[b] - differences()[a],
      }[view.sort];
      return list.sort((a, b) => rank(a, b) || a - b);
    };
    const differences = () => cached(`differ ${threshold()} ${state.label}`, () => {
      const right = judgedRuns.map((run) => imageCounts(run).counts), spread = new Uint16Array(images.ids.length);
      for (let image = 0; image < spread.length; image++) {
        const values = right.map((counts) => counts[image * 7 + RIGHT]);
        spread[image] = Math.max(...values) - Math.min(...values);
      }
      return spread;
    });
    const draw = () => {
      const list = ordered(), size = PAGE_SIZES.images;
      view.page = Math.min(view.page, Math.max(0, Math.ceil(list.length / size) - 1));
      clear(turning, pager(list.length, size, view.page, (to) => { view.page = to; draw(); }, "images"));
      clear(grid, list.slice(view.page * size, (view.page + 1) * size).map((image, i) => element("div", { class: "card", "data-image": images.ids[image] },
        element("h3", {}, element("button", { type: "button", class: "link", onclick: () => enlarge(list, view.page * size + i) }, images.files[image]), images.pictures[image] ? "" : element("span", { class: "muted" }, " boxes only")),
        panes(image))));
      drawPanes(grid);
    };
    const pictureNote = withPictures === images.ids.length ? "" : ` The page has pictures of ${withPictures.toLocaleString("en")} of the ${plural(images.ids.length, "image")}, of the others the boxes alone (clis report --images N).`;
    section("images", "Images",
      element("p", { class: "muted" }, `Each image with its ground truth and the boxes of every run, marked by verdict, not by class. The order is by the mistakes of the chosen run at the score above.${pictureNote} The page holds boxes with a score of at least ${data.floor}, of each image and run at most ${data.boxesOfAnImage} that are judged and as many that are not.`,
        data.federated ? " The annotation is federated: a box of a class that is not verified in its image is not judged, and not a mistake." : ""),
      element("div", { class: "controls" }, element("fieldset", {}, element("legend", {}, "verdicts (IoU 0.5)"), boxes),
        element("label", {}, "order", sort), withPictures && withPictures < images.ids.length ? element("label", {}, only, "only those with a picture") : null),
      turning, grid, dialog);
    let page = "";
    follow(["score", "run", "label"], () => { const now = `${state.run} ${state.label}`; if (now !== page) view.page = 0; page = now; draw(); });
    schemeListeners.push(draw);
    let width = grid.clientWidth;
    window.addEventListener("resize", () => { if (grid.clientWidth !== width) { width = grid.clientWidth; drawPanes(grid); } });
  }

  function regions() {
    const view = { page: 0, sort: "class" }, grid = element("div", { class: "regions" }), turning = element("div");
    const sort = element("select", { id: "region-sort", onchange: () => { view.sort = sort.value; view.page = 0; draw(); } }, [["class", "class"], ["low", "lowest score first"], ["high", "highest score first"]].map(([value, text]) => element("option", { value }, text)));
    const draw = () => {
      const list = data.regions.shown.filter((each) => state.label < 0 || each.label === state.label), size = PAGE_SIZES.regions;
      if (view.sort !== "class") list.sort((a, b) => (view.sort === "low" ? a.score - b.score : b.score - a.score));
      view.page = Math.min(view.page, Math.max(0, Math.ceil(list.length / size) - 1));
      clear(turning, pager(list.length, size, view.page, (to) => { view.page = to; draw(); }, "regions"));
      clear(grid, list.slice(view.page * size, (view.page + 1) * size).map((each) => {
        const canvas = element("canvas", { width: 220, height: Math.max(60, Math.min(440, Math.round(220 / each.ratio))), role: "img", "aria-label": `region of ${each.name}` });
        withPicture(each.picture, (picture) => {
          const context = canvas.getContext("2d"), [x1, y1, x2, y2] = each.box.map((value, i) => value * (i % 2 ? canvas.height : canvas.width));
          context.drawImage(picture, 0, 0, canvas.width, canvas.height);
          for (const [color, width, dash] of [["#fff", 5, []], ["#111", 2.5, each.source === "rule" ? [] : [7, 5]]]) {
            context.strokeStyle = color;
            context.lineWidth = width;
            context.setLineDash(dash);
            context.strokeRect(x1, y1, x2 - x1, y2 - y1);
          }
        });
        return element("figure", {}, canvas, element("figcaption", {}, classLink(each.label), ` ${short(each.score)}${each.source === "rule" ? "" : `, ${each.source}: no detection`}`, element("br"), each.name));
      }));
      if (!list.length && state.label >= 0) clear(grid, element("p", { class: "muted" }, `The page has no picture of a region of ${names[state.label]}; clis report --regions N embeds more.`));
    };
    section("regions", "Regions of the image-level stream",
      element("p", { class: "muted" }, `The pre-defined region of an image-level image, and the score that its detector gave it (rule ${data.regions.rule}, ${data.regions.file}, run ${data.regions.run}). Of each class the lowest, the median and the highest score; rare classes that fail come first. Dashed: the rule gave none, and the center box stands in.`),
      element("div", { class: "controls" }, element("label", {}, "order", sort)), turning, grid);
    follow(["label"], () => { view.page = 0; draw(); });
  }

  function recipe() {
    const keys = [...new Set(runs.flatMap((run) => Object.keys(run.recipe)))];
    const effective = (run, key) => run.recipe[key] ?? run.defaults[key] ?? "–"; // an older config.yaml lacks newer settings
    const differs = (key) => new Set(runs.map((run) => effective(run, key))).size > 1;
    const changed = (key) => runs.some((run) => key in run.defaults && run.recipe[key] !== run.defaults[key]);
    const table = (list) => element("div", { class: "scroll" }, element("table", { class: "recipe" },
      element("thead", {}, element("tr", {}, element("th", {}, "setting"), runs.map((_, run) => element("th", {}, runMark(run, false))), element("th", {}, "default"))),
      element("tbody", {}, list.map((key) => element("tr", { class: runs.length > 1 && differs(key) ? "differs" : "" }, element("th", { scope: "row", class: "mono" }, key),
        runs.map((run) => element("td", { class: key in run.recipe ? "mono" : "mono muted" }, effective(run, key))), element("td", { class: "mono muted" }, runs.map((run) => run.defaults[key]).find((value) => value != null) ?? "–"))))));
    const first = runs.length > 1 ? keys.filter(differs) : keys.filter(changed);
    section("recipe", "Recipe",
      element("h3", {}, runs.length > 1 ? `Where the runs differ (${first.length})` : `What differs from the defaults (${first.length})`), first.length ? table(first) : element("p", {}, "Nothing."),
      element("details", {}, element("summary", {}, `All ${keys.length} settings`), table(keys)),
      records());
  }

  /** Where the figures come from: code, libraries, date and hashes, as eval.json has them. */
  function records() {
    const keys = [...new Set(runs.flatMap((run) => Object.keys(run.record)))];
    if (!keys.length) return null;
    return element("details", {}, element("summary", {}, "Where the figures come from"), element("div", { class: "scroll" }, element("table", { class: "recipe" },
      element("thead", {}, element("tr", {}, element("th", {}, "record"), runs.map((_, run) => element("th", {}, runMark(run, false))))),
      element("tbody", {}, keys.map((key) => element("tr", {}, element("th", { scope: "row", class: "mono" }, key), runs.map((run) => element("td", { class: "mono" }, run.record[key] ?? "–"))))))));
  }

  // --- the page ---

  const schemeListeners = [];
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => schemeListeners.forEach((draw) => draw()));
  header();
  summary();
  curves();
  longTail();
  if (classes) {
    toolbar();
    classTable();
    oneClass();
    if (judgedRuns.length) {
      imageSection();
      confusion();
      errors();
      precisionRecall();
    }
    if (data.regions) regions();
  }
  recipe();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
