"use strict";
(() => {
  // Text from the run is only ever set as text, never parsed as markup.
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
      else if (name === "style") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
    return node;
  }
  const data = JSON.parse($("#data").textContent);
  const minus = (text) => text.replace("-", "\u2212");
  function tell(value, form) {
    if (value === null || value === undefined) return "–";
    if (form === "seconds") return `${tell(value)}\u00a0s`;
    if (form === "share" && value && Math.abs(value) < 5e-4) return "<0.1\u00a0%";
    if (form === "share") return minus((100 * value).toFixed(Math.abs(value) < 0.0995 && value !== 0 ? 1 : 0)) + "\u00a0%";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size < 1e-3) return minus(value.toExponential(1));
    if (size >= 1e4) return minus(Math.round(value).toLocaleString("en"));
    return minus(value.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.1 ? 2 : 3));
  }
  function signed(value) {
    if (value === null || value === undefined) return "–";
    const text = value.toFixed(Math.abs(value) < 10 ? 2 : 1);
    return Number(text) === 0 ? "0" : (value > 0 ? "+" : "") + minus(text);
  }
  const tone = (value) => (value === null || value === undefined ? "" : value < 0 ? "neg" : "pos");

  // --- Theme, runs, sections. ---

  const themes = ["system", "light", "dark"];
  let theme = 0;
  $("#theme").addEventListener("click", (event) => {
    theme = (theme + 1) % themes.length;
    const name = themes[theme];
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    const label = name === "system" ? "Theme: as the system" : `Theme: ${name}`;
    event.currentTarget.setAttribute("aria-label", label);
    event.currentTarget.title = label;
    document.dispatchEvent(new Event("redraw"));
  });

  document.documentElement.classList.add("scripted");
  function showRun(number) {
    for (const study of $$(".study")) study.classList.toggle("shown", study.dataset.run === String(number));
    document.dispatchEvent(new Event("redraw"));
  }
  showRun(0);
  $("#run")?.addEventListener("change", (event) => showRun(event.target.value));

  const links = new Map($$("nav a").map((link) => [link.getAttribute("href").slice(1), link]));
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
    },
    { rootMargin: "-20% 0px -70% 0px" },
  );
  for (const section of $$("main > section")) watcher.observe(section);

  // --- Every table as CSV, with one value in each cell. ---

  let everyDialogue = null; // rows of the list of dialogues, which shows only the first ones
  function cells(table) {
    const text = (node) => {
      const copy = node.cloneNode(true);
      for (const sign of $$("[aria-hidden]", copy)) sign.remove();
      const plain = copy.textContent.trim().replace(/\s+/g, " ").replaceAll("\u2212", "-");
      return node.matches(".n") ? plain.replace(/(?<=\d),(?=\d{3})/g, "") : plain;
    };
    const titles = [...table.tHead.rows[0].cells].map((head) => head.dataset.csv?.split("|") ?? [text(head)]);
    const values = (cell, number) => {
      if (number === 1) return [text(cell)];
      // A number with its count or its interval: "12 % (31 of 256)", "1.5 (0.2 to 2.8)".
      if (cell.matches(".n")) return text(cell).split(/ ?[()]|(?: of | to )/).filter(Boolean);
      const own = [...cell.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE);
      return [own.map((node) => node.data.trim()).join(""), ...["small", "q"].map((tag) => $(tag, cell)?.textContent ?? "")];
    };
    const padded = (cell, names) => { const found = values(cell, names.length); return names.map((_, i) => found[i] ?? ""); };
    const row = (line) => titles.flatMap((names, i) => (names[0] ? padded(line.cells[i], names) : []));
    return [titles.flat().filter(Boolean), ...[...table.tBodies[0].rows].map(row)];
  }
  function csv(table) {
    const rows = table.id === "list" ? everyDialogue() : cells(table);
    return rows.map((row) => row.map((value) => `"${String(value ?? "").replaceAll('"', '""')}"`).join(",") + "\r\n").join("");
  }
  for (const table of $$("main table")) {
    const name = (table.caption ?? table.closest(".card, section")?.querySelector("h2, h3, summary") ?? table).textContent.trim().slice(0, 60).replace(/\W+/g, "-") || "table";
    const save = make("a", { class: "csv", href: "#", download: `${name}.csv`, on: { click: () => { save.href = URL.createObjectURL(new Blob([csv(table)], { type: "text/csv" })); } } }, "CSV");
    (table.closest(".scroll") ?? table).after(save);
  }

  // --- Charts: a cursor with values. ---

  const tip = $("#tip");
  function attach(figure) {
    const chart = data.charts[figure.dataset.chart];
    const plot = $(".plot", figure);
    const xs = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    if (!xs.length) return;
    const [x0, x1, y0, y1] = chart.domain;
    let at = -1;
    let cursor = null;
    function show(index) {
      at = Math.max(0, Math.min(xs.length - 1, index));
      const x = xs[at];
      cursor ??= plot.appendChild(make("div", { class: "cursor" }));
      cursor.style.left = `${(100 * (x - x0)) / (x1 - x0)}%`;
      const lines = [make("b", {}, `${chart.x} ${x}`)];
      const dots = [];
      for (const series of chart.series) {
        const place = series.x.indexOf(x);
        if (place < 0 || series.y[place] === null) continue;
        const [low, high] = series.band[place] ?? [null, null];
        const range = low === null || high === null ? "" : ` (${tell(low, chart.form)} to ${tell(high, chart.form)})`;
        const name = chart.series.length > 1 ? `${series.name}: ` : "";
        lines.push(make("span", {}, name + tell(series.y[place], chart.form) + range));
        dots.push(
          make("i", { style: { "--c": `var(--${series.colour})`, top: `${(100 * (y1 - series.y[place])) / (y1 - y0)}%` } }),
        );
      }
      cursor.replaceChildren(...dots);
      tip.replaceChildren(...lines);
      tip.hidden = false;
      const box = cursor.getBoundingClientRect();
      const size = tip.getBoundingClientRect();
      const right = box.left + 14 + size.width > innerWidth ? box.left - 14 - size.width : box.left + 14;
      tip.style.left = `${Math.max(4, right)}px`;
      tip.style.top = `${Math.max(4, Math.min(innerHeight - size.height - 4, box.top + 8))}px`;
    }
    function hide() {
      cursor?.remove();
      cursor = null;
      tip.hidden = true;
    }
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
      let best = 0;
      for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
      show(best);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const last = xs.length - 1;
      const target = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") hide();
      if (target === undefined) return;
      event.preventDefault();
      show(target);
    });
  }
  $$(".chart").forEach(attach);

  // --- What is repeated, step by step. ---

  for (const box of $$("[data-steps]")) {
    const steps = data.steps[box.dataset.steps];
    const slider = $("input", box);
    slider.max = steps.length - 1;
    slider.value = steps.length - 1;
    slider.disabled = steps.length < 2;
    slider.addEventListener("input", () => {
      const step = steps[slider.value];
      $("output", box).textContent = step.step;
      slider.setAttribute("aria-valuetext", `step ${step.step}`);
      [step.openings, step.phrases].forEach((entries, index) => {
        $(`[data-repeats="${index}"] tbody`, box).replaceChildren(
          ...entries.map(([text, count, share, reward, cost]) =>
            make("tr", {},
              make("td", {}, make("q", {}, text)),
              make("td", { class: "n" }, String(count)),
              make("td", { class: "n" }, tell(share, "share")),
              make("td", { class: "n" }, signed(reward)),
              make("td", { class: `n ${tone(cost)}` }, signed(cost)))),
        );
      });
    });
  }

  // --- The state space in three dimensions. ---

  function cube(box) {
    const ways = JSON.parse($(".ways", box).textContent);
    const canvas = $("canvas", box);
    const pen = canvas.getContext("2d");
    const all = $$(".ways").flatMap((node) => JSON.parse(node.textContent)); // all runs have one scale
    const low = Math.min(-10, ...all.flatMap((way) => way.p.flat()));
    const longest = Math.max(...ways.map((way) => way.p.length));
    const means = ["before", "after"].flatMap((colour) => {
      const own = ways.filter((way) => way.c === colour);
      if (!own.length) return [];
      const mean = Array.from({ length: longest }, (_, t) =>
        [0, 1, 2].map((axis) => own.reduce((sum, way) => sum + way.p[Math.min(t, way.p.length - 1)][axis], 0) / own.length));
      return [{ p: mean, c: colour }];
    });
    let yaw = -0.62;
    let pitch = 0.42;
    let until = longest;
    const probe = box.appendChild(make("span", { hidden: true }));
    function colour(name) {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    }
    function project([c, a, p]) {
      const [x, y, z] = [c, a, p].map((value) => value / -low + 0.5);
      const right = x * Math.cos(yaw) - z * Math.sin(yaw);
      const back = x * Math.sin(yaw) + z * Math.cos(yaw);
      const up = y * Math.cos(pitch) - back * Math.sin(pitch);
      return [320 + 318 * right, 268 - 318 * up];
    }
    function line(points, width, opacity, ink) {
      pen.strokeStyle = ink;
      pen.globalAlpha = opacity;
      pen.lineWidth = width;
      pen.beginPath();
      points.forEach((point, index) => pen[index ? "lineTo" : "moveTo"](...project(point)));
      pen.stroke();
      pen.globalAlpha = 1;
    }
    function end(point, size, kind, ink, rim) {
      const [x, y] = project(point);
      pen.fillStyle = ink;
      pen.beginPath();
      if (kind === "before") pen.rect(x - size, y - size, 2 * size, 2 * size);
      else pen.arc(x, y, size, 0, 7);
      pen.fill();
      if (rim) {
        pen.strokeStyle = rim;
        pen.lineWidth = 2;
        pen.stroke();
      }
    }
    function draw() {
      if (!box.offsetParent) return;
      const scale = Math.min(3, devicePixelRatio || 1);
      canvas.width = 640 * scale;
      canvas.height = 560 * scale;
      pen.setTransform(scale, 0, 0, scale, 0, 0);
      pen.lineJoin = "round";
      const [ink, grid, panel] = ["soft", "line", "panel"].map(colour);
      const ends = [low, 0];
      for (const a of ends) for (const b of ends) {
        line([[low, a, b], [0, a, b]], 1, 1, grid);
        line([[a, low, b], [a, 0, b]], 1, 1, grid);
        line([[a, b, low], [a, b, 0]], 1, 1, grid);
      }
      pen.font = "13px sans-serif";
      pen.fillStyle = ink;
      pen.textAlign = "center";
      for (const [text, point] of [["C", [low / 2, low * 1.09, low]], ["A", [low * 1.08, low / 2, low]], ["P", [low, low * 1.09, low / 2]], ["rest", [0, 1.5, 0]]])
        pen.fillText(text, ...project(point));
      end([0, 0, 0], 5, "after", ink);
      for (const way of ways) {
        const part = way.p.slice(0, until + 1);
        line(part, 1.1, 0.45, colour(way.c));
        end(part.at(-1), 2.6, way.c, colour(way.c));
      }
      for (const way of means) {
        const part = way.p.slice(0, until + 1);
        line(part, 8, 1, panel);
        line(part, 4, 1, colour(way.c));
        end(part.at(-1), 7, way.c, colour(way.c), panel);
      }
    }
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = [event.clientX, event.clientY, yaw, pitch];
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag) return;
      yaw = drag[2] + (event.clientX - drag[0]) / 160;
      pitch = Math.max(-1.5, Math.min(1.5, drag[3] + (event.clientY - drag[1]) / 160));
      draw();
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (drag = null));
    canvas.addEventListener("keydown", (event) => {
      const turn = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] }[event.key];
      if (!turn) return;
      event.preventDefault();
      yaw += turn[0];
      pitch = Math.max(-1.5, Math.min(1.5, pitch + turn[1]));
      draw();
    });
    let timer = null;
    $(".play", box).addEventListener("click", () => {
      clearInterval(timer);
      until = 0;
      draw();
      timer = setInterval(() => {
        until += 1;
        draw();
        if (until >= longest) clearInterval(timer);
      }, 450);
    });
    document.addEventListener("redraw", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    draw();
  }
  $$(".cube").forEach(cube);

  // --- The dialogues: unpacked when they are asked for. ---

  const pieces = new Map($$("[data-piece]").map((node) => [node.dataset.piece, node]));
  const unpacked = new Map();
  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }
  function piece(key) {
    if (!pieces.has(key)) return Promise.resolve(null);
    if (!unpacked.has(key)) {
      if (unpacked.size > 24) unpacked.delete(unpacked.keys().next().value); // a page may hold hundreds
      unpacked.set(key, unpack(pieces.get(key).textContent));
    }
    return unpacked.get(key);
  }

  async function browse() {
    const browser = $("#browser");
    browser.hidden = false;
    if (typeof DecompressionStream === "undefined") {
      browser.replaceChildren(make("p", { class: "empty" }, "This browser cannot unpack the dialogues; one of 2023 or later can."));
      return;
    }
    const index = await unpack($("#index").textContent);
    const rows = index.rows.map(([run, held, step, s, r, card, outcome, turns, unscored, cut, failures, value, score, place]) => ({
      run, held, step, s, r, card: index.cards[card], cardNumber: card, outcome, turns, unscored, cut, failures, value, score, place,
      group: `${run}.${held ? "v" : "t"}${step}`,
      key: `${run}.${held ? "v" : "t"}${step}.${s}.${r}`,
    }));
    const byKey = new Map(rows.map((row) => [row.key, row]));
    const many = index.runs.length > 1;
    const heldSteps = index.runs.map((_, run) => rows.filter((row) => row.run === run && row.held).map((row) => row.step));
    const firstHeld = heldSteps.map((steps) => steps.reduce((a, b) => Math.min(a, b), Infinity));
    const lastHeld = heldSteps.map((steps) => steps.reduce((a, b) => Math.max(a, b), -Infinity));
    function when(row) {
      if (!row.held) return `step ${row.step}`;
      if (firstHeld[row.run] === lastHeld[row.run]) return `validation ${row.step}`;
      if (row.step === firstHeld[row.run]) return row.step === 0 ? "before" : `validation ${row.step}`;
      return row.step === lastHeld[row.run] ? "after" : `validation ${row.step}`;
    }

    // Filters.
    const form = $("#filters");
    const choices = {};
    function chooser(name, label, options) {
      const select = make("select", { name, id: `filter-${name}` }, options.map(([value, text]) => make("option", { value }, text)));
      choices[name] = select;
      form.append(make("label", { for: select.id }, label, select));
    }
    const unique = (values) => [...new Set(values)].sort((a, b) => (a > b ? 1 : a < b ? -1 : 0));
    if (many) chooser("run", "run", [["", "all"], ...index.runs.map((run, number) => [String(number), run.name])]);
    chooser("set", "dialogues", [["", "all"], ["1", "validation"], ["0", "training"]]);
    chooser("step", "step", [["", "all"], ...unique(rows.map((row) => row.step)).map((step) => [String(step), String(step)])]);
    chooser("domain", "domain", [["", "all"], ...unique(rows.map((row) => row.card.domain ?? "none")).map((name) => [name, name])]);
    chooser("scenario", "scenario", [["", "all"], ...unique(rows.map((row) => row.card.id)).map((name) => [name, name])]);
    chooser("outcome", "outcome", [["", "all"], ...unique(rows.map((row) => row.outcome)).map((name) => [name, name])]);
    chooser("failure", "failures", [["", "any or none"], ["none", "none"], ["unscored", "unscored turns"], ["error", "ended in error"], ["cut", "cut replies"],
      ...unique(rows.flatMap((row) => row.failures)).map((kind) => [`is:${kind}`, kind])]);
    const search = make("input", { type: "search", name: "text", id: "filter-text", placeholder: "words, then Enter" });
    form.append(make("label", { for: "filter-text" }, "said by anyone", search));
    form.append(make("button", { type: "reset" }, "Clear"));

    // List.
    const columns = [["step", "step"], ["card", "scenario"], ["outcome", "end"], ["turns", "turns"], ["value", "return"], ["score", "EPM-Q"]];
    const numeric = new Set(["step", "turns", "value", "score"]);
    const sorting = { by: "step", down: true };
    let shown = [];
    let limit = 60;
    let found = null; // keys that hold the searched words
    let sought = ""; // these words
    function marked(text) {
      const parts = [];
      const lower = text.toLowerCase();
      let at = 0;
      for (let hit; sought && (hit = lower.indexOf(sought, at)) >= 0; at = hit + sought.length)
        parts.push(text.slice(at, hit), make("mark", {}, text.slice(hit, hit + sought.length)));
      return [...parts, text.slice(at)];
    }
    const head = make("tr");
    $("#list thead").append(head);
    for (const [name, title] of columns)
      head.append(make("th", { class: numeric.has(name) ? "n" : null },
        make("button", { type: "button", "data-sort": name, on: { click: () => sortBy(name) } }, title)));
    const value = { step: (row) => row.step, card: (row) => row.card.id, outcome: (row) => row.outcome, turns: (row) => row.turns, value: (row) => row.value, score: (row) => row.score };
    function sortBy(name) {
      sorting.down = sorting.by === name ? !sorting.down : numeric.has(name);
      sorting.by = name;
      list();
    }
    function matches(row) {
      const is = (name, actual) => !choices[name]?.value || choices[name].value === String(actual);
      const failure = choices.failure.value;
      return (
        is("run", row.run) && is("set", row.held) && is("step", row.step) && is("domain", row.card.domain ?? "none") &&
        is("scenario", row.card.id) && is("outcome", row.outcome) &&
        (!failure || (failure === "unscored" && row.unscored > 0) || (failure === "error" && row.outcome === "error") ||
          (failure === "cut" && row.cut > 0) || (failure.startsWith("is:") && row.failures.includes(failure.slice(3))) || (failure === "none" && !row.unscored && row.outcome !== "error" && !row.cut)) &&
        (found === null || found.has(row.key))
      );
    }
    function list() {
      const get = value[sorting.by];
      const sign = sorting.down ? -1 : 1;
      shown = rows.filter(matches).sort((one, other) => {
        const [a, b] = [get(one), get(other)];
        if (a === null || b === null) return (a === null) - (b === null); // those without a value last
        return sign * (a > b ? 1 : a < b ? -1 : 0) || other.held - one.held || one.s - other.s || one.r - other.r;
      });
      for (const button of $$("button", head)) {
        const own = button.dataset.sort === sorting.by;
        button.setAttribute("aria-pressed", own);
        button.parentElement.setAttribute("aria-sort", own ? (sorting.down ? "descending" : "ascending") : "none");
        button.textContent = columns.find(([name]) => name === button.dataset.sort)[1] + (own ? (sorting.down ? " ↓" : " ↑") : "");
      }
      $("#count").textContent = `${shown.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} dialogues`;
      $("#list tbody").replaceChildren(
        ...shown.slice(0, limit).map((row) =>
          make("tr", { "data-key": row.key, class: row.key === open?.row.key ? "open" : null, on: { click: (event) => event.target.closest("a") || (location.hash = `d=${row.key}`) } },
            make("td", { class: "n" }, row.held ? make("span", { class: when(row) === "before" ? "tag before" : "tag" }, when(row)) : String(row.step)),
            make("td", {}, make("a", { href: `#d=${row.key}` }, row.card.id), make("small", {}, [many ? index.runs[row.run].name : null, row.card.domain, row.unscored ? `${row.unscored} unscored` : null, row.cut ? `${row.cut} cut` : null].filter(Boolean).join(" · "))),
            make("td", {}, row.outcome),
            make("td", { class: "n" }, String(row.turns)),
            make("td", { class: `n ${tone(row.value)}` }, signed(row.value)),
            make("td", { class: "n" }, tell(row.score)))),
      );
      $("#more").hidden = shown.length <= limit;
    }
    everyDialogue = () => [
      ["run", "set", "step", "scenario", "domain", "rollout", "end", "turns", "unscored turns", "cut replies", "return", "EPM-Q"],
      ...shown.map((row) => [index.runs[row.run].name, row.held ? "validation" : "training", row.step, row.card.id, row.card.domain, row.r + 1, row.outcome, row.turns, row.unscored, row.cut, row.value, row.score]),
    ];
    form.addEventListener("change", (event) => {
      if (event.target !== search) {
        limit = 60;
        list();
      }
    });
    form.addEventListener("reset", () => setTimeout(() => { found = null; sought = ""; limit = 60; list(); if (open) present(open, false); }));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      await look();
    });
    search.addEventListener("search", look);
    async function look() {
      const words = search.value.trim().toLowerCase();
      sought = words;
      if (!words) {
        found = null;
      } else {
        const hits = new Set();
        $("#count").textContent = "searching…";
        for (const group of new Set(rows.map((row) => row.group))) {
          const dialogues = await piece(group);
          for (const row of rows) {
            if (row.group !== group) continue;
            const talk = dialogues[row.place];
            if (talk.turns.some((turn) => turn.u.toLowerCase().includes(words) || turn.r.toLowerCase().includes(words))) hits.add(row.key);
          }
        }
        found = hits;
      }
      limit = 60;
      list();
      const hit = found === null || !open || found.has(open.row.key) ? open : { row: shown[0], other: null, turn: null };
      if (hit?.row) await present(hit, false);
    }
    $("#more").addEventListener("click", () => {
      limit += 200;
      list();
    });

    // Reader.
    const reader = $("#reader");
    const panes = $(".panes");
    let open = null; // {row, other, turn}
    let tokens = false;
    function parse() {
      const parts = new URLSearchParams(location.hash.slice(1));
      const row = byKey.get(parts.get("d"));
      return row ? { row, other: byKey.get(parts.get("with")) ?? null, turn: parts.get("turn") } : null;
    }
    const link = (row, other, turn) => `#d=${row.key}${other ? `&with=${other.key}` : ""}${turn ? `&turn=${turn}` : ""}`;
    function siblings(row) {
      return rows.filter((other) => other.card.id === row.card.id && other.key !== row.key)
        .sort((a, b) => b.held - a.held || a.run - b.run || a.step - b.step || a.r - b.r);
    }
    function counterpart(row) {
      // The same scenario as early, or as late, as there is: before against after.
      const same = rows.filter((other) => other.card.id === row.card.id && other.held === row.held && other.run === row.run);
      const steps = same.map((other) => other.step);
      const early = Math.min(...steps);
      const goal = row.step === early ? Math.max(...steps) : early;
      const there = same.filter((other) => other.step === goal && other.key !== row.key);
      return there.find((other) => other.r === row.r) ?? there[0] ?? null;
    }
    const name = (row) => `${many ? `${index.runs[row.run].name}, ` : ""}${when(row)}, rollout ${row.r + 1}, return ${signed(row.value)}`;
    let drawing = 0;
    async function read() {
      const asked = parse();
      if (asked) await present(asked, true);
    }
    async function present(asked, move) {
      open = asked;
      const turn = ++drawing;
      const { row, other } = asked;
      const sides = other ? [row, other].sort((a, b) => a.run - b.run || a.step - b.step) : [row];
      const talks = await Promise.all(sides.map(async (side) => (await piece(side.group))[side.place]));
      const rowsOfTokens = await Promise.all(sides.map(async (side) => {
        const found = tokens ? await piece(`${side.group}.tokens`) : null;
        return found && { words: found.words, rows: found.rows[side.place] };
      }));
      if (turn !== drawing) return; // another dialogue was asked for meanwhile
      const place = shown.findIndex((entry) => entry.key === row.key);
      const step = (by) => { const next = shown[place + by]; if (next) location.hash = link(next); };
      const twin = counterpart(row);
      const compare = make("select", { id: "compare", on: { change: (event) => { location.hash = link(row, byKey.get(event.target.value)); } } },
        make("option", { value: "" }, "alone"), siblings(row).map((entry) => make("option", { value: entry.key }, name(entry))));
      compare.value = other?.key ?? "";
      const copy = make("button", { type: "button", on: { click: async () => {
        try { await navigator.clipboard.writeText(location.href); copy.textContent = "Copied"; } catch { copy.textContent = "Copy it from the address bar"; }
      } } }, "Copy link");
      const tools = make("div", { class: "tools" },
        make("button", { type: "button", class: "back", on: { click: close } }, "← List"),
        make("button", { type: "button", disabled: place <= 0, on: { click: () => step(-1) } }, "Previous"),
        make("button", { type: "button", disabled: place < 0 || place >= shown.length - 1, on: { click: () => step(1) } }, "Next"),
        twin && !other ? make("button", { type: "button", id: "twin", on: { click: () => { location.hash = link(row, twin); } } }, "Before and after") : null,
        make("label", { for: "compare" }, "beside it "), compare,
        make("button", { type: "button", id: "tokens", "aria-pressed": tokens, on: { click: () => { tokens = !tokens; present(asked, false); } } }, tokens ? "Hide tokens" : "Tokens"),
        copy);
      const columns = make("div", { class: other ? "columns two" : "columns" },
        sides.map((side, number) => dialogue(side, talks[number], rowsOfTokens[number], other, talks)));
      reader.replaceChildren(tools, columns);
      reader.setAttribute("aria-label", `Dialogue ${row.card.id}, ${name(row)}`);
      if (move) panes.classList.add("reading");
      panes.classList.toggle("pairing", Boolean(other));
      for (const line of $$("#list tbody tr")) line.classList.toggle("open", line.dataset.key === row.key);
      if (many) { $("#run").value = row.run; showRun(row.run); }
      const line = $("#list tr.open");
      if (line) line.closest(".scroll").scrollTop = Math.max(0, line.offsetTop - 200);
      if (!move) return;
      const target = asked.turn && $(`[data-turn="${Number(asked.turn)}"]`, reader);
      if (target) target.classList.add("here");
      (target || reader).scrollIntoView({ block: "start" });
      reader.focus({ preventScroll: true });
    }
    function close() {
      panes.classList.remove("reading", "pairing");
      history.replaceState(null, "", "#dialogues");
      const line = $(`#list tr.open a`);
      $("#dialogues").scrollIntoView();
      line?.focus();
    }
    reader.addEventListener("keydown", (event) => {
      if (event.target.closest("select")) return;
      const place = shown.findIndex((entry) => entry.key === open?.row.key);
      const next = { j: shown[place + 1], k: shown[place - 1] }[event.key];
      if (next) location.hash = link(next);
      if (event.key === "Escape") close();
    });

    // `talks`: those shown beside each other, which share their scales.
    function dialogue(row, talk, tokenRows, paired, talks) {
      const card = row.card;
      const person = [card.name, card.age].filter(Boolean).join(", ");
      const about = [["who", [person, card.social].filter(Boolean).join(". ")], ["within", card.inner], ["trigger", card.trigger], ["situation", card.situation], ["hopes", card.hope], ["dislikes", card.dislike]].filter(([, text]) => text);
      const scale = (from, to) => Math.max(1e-9, ...talks.flatMap((each) => each.turns).flatMap((turn) => turn.c.slice(from, to).map((entry) => Math.abs(entry ?? 0))));
      const scales = [scale(0, 2), scale(0, 2), scale(2, 5), scale(2, 5), scale(2, 5)];
      const most = Math.max(1e-9, ...talks.flatMap((each) => [each.distance, ...each.turns.map((turn) => turn.d)]));
      const ways = [talk.distance, ...talk.turns.map((turn) => turn.d)];
      const ending = { success: "reached equilibrium", failure: "failed", timeout: "ran out of turns", ended: "was ended by the director", error: "broke off: a user or director call failed" }[row.outcome] ?? row.outcome;
      return make("section", { class: when(row) === "before" ? "dialogue before" : "dialogue" },
        make("h3", {}, card.topic ?? card.id),
        make("p", { class: "meta" }, make("span", { class: when(row) === "before" ? "tag before" : "tag" }, when(row)), ` ${many ? `${index.runs[row.run].name} · ` : ""}${card.id} · ${card.domain ?? "no domain"} · ${card.split ?? ""} card · rollout ${row.r + 1}`),
        make("p", { class: "meta" }, `Return ${signed(row.value)} · EPM-Q ${tell(row.score)} · ${ending} after ${row.turns} turns`, talk.rule ? ` (${talk.rule})` : "", talk.failure ? ` (${talk.failure})` : "", row.held ? " · validation: nothing was learnt from it" : talk.turns.every((turn) => turn.c.length < 5 || turn.c[4] === null) ? " · left out: nothing was learnt from it" : ""),
        about.length ? make("details", { class: "cardtext" }, make("summary", {}, "The card"), make("dl", {}, about.flatMap(([term, text]) => [make("dt", {}, term), make("dd", {}, text)]))) : null,
        make("div", { class: "lack", role: "img", "aria-label": `What is lacking: ${ways.map((d) => d.toFixed(1)).join(", ")}` },
          ways.map((d, t) => make("a", { href: t ? link(row, paired && open?.row.key === row.key ? open.other : paired && open ? open.row : null, t) : null, tabindex: "-1", class: t && d > ways[t - 1] ? "worse" : null, title: `${t ? `after turn ${t}` : "at the start"}: D = ${d.toFixed(1)}`, style: { height: `${(100 * d) / most}%` } }))),
        make("p", { class: "tokenkey" }, `What the user lacks after each turn: ${ways[0].toFixed(1)} → ${ways.at(-1).toFixed(1)}. Hatched where it grew.`),
        tokens && !tokenRows ? make("p", { class: "empty" }, "The tokens of this dialogue are not in the page; they are in the run folder.") : null,
        tokenRows ? make("p", { class: "tokenkey" }, "Solid line: sampled and in the loss, with its log-probability in nats (redder: less likely). Dotted: sampled, not in the loss. No line: rendered.") : null,
        talk.turns.map((turn, t) => turnView(row, talk, turn, t, scales, tokenRows, paired)));
    }
    function turnView(row, talk, turn, t, scales, tokenRows, paired) {
      const before = t ? talk.turns[t - 1] : { p: talk.start, d: talk.distance };
      const names = ["reward", "return", "turn-level advantage", "batch-level advantage", index.runs[row.run].estimator === "mapo" ? "mixed advantage" : `advantage by ${index.runs[row.run].estimator}`];
      const credit = make("div", { class: "credit" },
        turn.c.flatMap((entry, i) => i > 1 && row.held ? [] : [
          make("span", { class: i === 4 ? "name total" : "name" }, names[i]),
          make("span", { class: `value ${tone(entry)}` }, entry === null ? "none" : signed(entry)),
          make("span", { class: "dbar", "aria-hidden": "true" }, entry === null ? null : make("i", { class: tone(entry), style: { width: `${(50 * Math.min(1, Math.abs(entry) / scales[i])).toFixed(1)}%` } }))]));
      const whole = (number) => minus(String(Math.round(10 * number) / 10));
      const move = (axis, from, to) => make("span", { class: from === to ? null : "moved" }, `${axis} ${from === to ? whole(to) : `${whole(from)} → ${whole(to)}`}`);
      const state = make("p", { class: "statecell" }, ["C", "A", "P"].map((axis, i) => move(axis, before.p[i], turn.p[i])), move("D", before.d, turn.d));
      const told = (k) => make("p", { class: "level-row" },
        make("span", { class: `chip ${turn.l[k] > 0 ? "plus" : turn.l[k] < 0 ? "minus" : ""}` }, `${"CAP"[k >> 1]} ${turn.l[k] > 0 ? "+" : turn.l[k] < 0 ? "\u2212" : ""}${Math.abs(turn.l[k])}`),
        make("span", { class: "why" }, turn.w[k] ? `${turn.w[k]} ` : "", turn.e[k] ? make("q", { dir: "auto" }, turn.e[k]) : ""));
      const nonzero = [0, 1, 2, 3, 4, 5].filter((k) => turn.l !== null && turn.l[k] !== 0);
      const zero = [0, 1, 2, 3, 4, 5].filter((k) => turn.l !== null && turn.l[k] === 0);
      const levels = make("div", { class: "levels" }, turn.l === null
        ? make("p", { class: "flag" }, `The judge failed (${turn.f ?? "no reason given"}): no score, not in the loss.`)
        : [nonzero.map(told), zero.length ? make("details", {}, make("summary", {}, nonzero.length ? `${zero.length} levels at 0` : "All levels at 0"), zero.map(told)) : null]);
      const named = (turn.n ?? []).map(([what, right]) => `${what} ${right ? "✓" : "✗"}`).join(", ");
      return make("div", { class: "turn", "data-turn": t + 1 },
        make("p", { class: "nr" }, make("a", { href: link(row, paired && open?.row.key === row.key ? open.other : paired && open ? open.row : null, t + 1) }, `turn ${t + 1}`),
          turn.k ? make("span", {}, `kind: ${turn.k.replaceAll("_", " ")}${named ? `; names ${named}` : ""}`) : null,
          turn.x ? make("span", { class: "flag" }, "cut by its token limit") : null),
        make("p", { class: "user", dir: "auto" }, marked(turn.u)),
        make("p", { class: "reply", dir: "auto" }, turn.r ? marked(turn.r) : "(nothing)"),
        tokenRows ? tokenView(tokenRows, turn, t) : null,
        make("div", { class: "judged" }, make("div", {}, credit, state), levels),
        turn.a ? make("p", { class: "guide" }, `director: ${turn.a.replaceAll("_", " ")}${turn.g ? ` · ${turn.g}` : ""}`) : null);
    }
    function expand(runs) {
      const out = [];
      for (let i = 0; i < runs.length; i += 2) for (let k = 0; k < runs[i + 1]; k++) out.push(runs[i]);
      return out;
    }
    function tokenView({ words, rows: tokenRows }, turn, t) {
      const row = tokenRows.length > 1 ? tokenRows[t] : tokenRows[0];
      if (!row) return make("p", { class: "tokenkey" }, "no tokens");
      const turns = expand(row.t);
      const sampled = expand(row.s);
      const last = turns.lastIndexOf(t);
      const first = tokenRows.length > 1 ? 0 : t ? turns.lastIndexOf(t - 1) + 1 : 0;
      if (last < 0) return make("p", { class: "tokenkey" }, "no tokens");
      let logprob = sampled.slice(0, first).filter(Boolean).length;
      const nodes = [];
      for (let i = first; i <= last; i++) {
        const text = words[row.i[i]];
        const plain = text.replaceAll("\n", "⏎") || "∅";
        if (!sampled[i]) nodes.push(make("span", {}, plain));
        else {
          const nats = row.l[logprob++] / 100;
          const probability = Math.exp(-nats);
          nodes.push(turn.l !== null && turns[i] === t
            ? make("span", { class: "in", title: `log-probability ${minus((-nats).toFixed(2))}, probability ${(100 * probability).toFixed(1)} %`, style: { "--p": (34 * (1 - probability)).toFixed(0) } }, plain, make("small", {}, nats ? minus((-nats).toFixed(2)) : "0"))
            : make("span", { class: "out" }, plain));
        }
        if (text.includes("\n")) nodes.push(make("span", { class: "break" }));
      }
      return make("div", { class: "tokens" }, nodes);
    }

    list();
    addEventListener("hashchange", read);
    if (parse()) await read();
    else if (shown.length) await present({ row: shown[0], other: null, turn: null }, false);
    document.documentElement.dataset.ready = "yes";
  }
  // After the first paint.
  requestAnimationFrame(() => setTimeout(browse));
})();
