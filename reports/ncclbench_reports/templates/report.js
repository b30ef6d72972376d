"use strict";
// Draws the plots, sorts and filters the tables, and changes between light and dark. It fetches nothing.
(() => {
  const root = document.documentElement;
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const specs = read("figure-data");
  const longTables = read("table-data");
  const canvases = [...document.querySelectorAll(".canvas")];

  // ---- light and dark -------------------------------------------------------------------------------------------
  const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  let chosen = null; // the choice of the reader; until then the system decides
  let paper = false;

  function isDark() {
    return !paper && (chosen === null ? wantsDark.matches : chosen === "dark");
  }

  function applyTheme() {
    const dark = isDark();
    root.dataset.theme = dark ? "dark" : "light";
    if (button) {
      button.setAttribute("aria-pressed", String(dark));
    }
    for (const canvas of canvases) {
      if (canvas.dataset.drawn) {
        Plotly.relayout(canvas, themed());
      }
    }
  }

  function themed() {
    const css = getComputedStyle(root);
    const of = (name) => css.getPropertyValue(name).trim();
    return {
      "paper_bgcolor": of("--page"), "plot_bgcolor": of("--page"), "font.color": of("--text"),
      "xaxis.gridcolor": of("--grid"), "yaxis.gridcolor": of("--grid"),
      "xaxis.linecolor": of("--line"), "yaxis.linecolor": of("--line"),
      "xaxis.zerolinecolor": of("--line"), "yaxis.zerolinecolor": of("--line"),
      "hoverlabel.bgcolor": of("--card"), "hoverlabel.bordercolor": of("--line"), "hoverlabel.font.color": of("--text"),
    };
  }

  // ---- legends --------------------------------------------------------------------------------------------------
  const TITLE_HEIGHT = 62; // of the marks and the title of an axis
  const NARROW = 480;
  const LEGEND_ROW = 20;
  const SYMBOL_WIDTH = 42; // plotly draws a symbol before a name
  const pen = document.createElement("canvas").getContext("2d");

  // The width of each entry, and the height of all of them in a plot of this width.
  function legendOf(spec, width) {
    const names = spec.data.filter((trace) => trace.name && trace.showlegend !== false).map((trace) => trace.name);
    pen.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const plain = (name) => new DOMParser().parseFromString(name, "text/html").body.textContent;
    const widest = Math.max(0, ...names.map((name) => pen.measureText(plain(name)).width));
    const entrywidth = Math.ceil(Math.min(widest + 8, Math.max(80, width - SYMBOL_WIDTH - 24)));
    const across = Math.max(1, Math.floor((width - 12) / (entrywidth + SYMBOL_WIDTH)));
    return { entries: names.length, entrywidth, height: 12 + LEGEND_ROW * Math.ceil(names.length / across) };
  }

  // ---- plots ----------------------------------------------------------------------------------------------------
  function layoutOf(spec, canvas) {
    const { square, bars, ...own } = structuredClone(spec.layout);
    const legend = legendOf(spec, canvas.clientWidth);
    const shown = own.showlegend ?? legend.entries > 1;
    const below = TITLE_HEIGHT + (shown ? legend.height : 0);
    let inner = 300;
    if (square) {
      inner = Math.max(260, Math.min(540, canvas.clientWidth - 80));
    }
    if (bars) {
      inner = Math.max(180, (canvas.clientWidth < NARROW ? 46 : 34) * bars);
    }
    // The legend has its own height below the title of the axis, so it never squeezes the plot.
    const layout = {
      height: 10 + inner + below, autosize: true, margin: { l: 62, r: 16, t: 10, b: below },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12 },
      showlegend: shown, hovermode: "closest", hoverlabel: { align: "left" }, dragmode: false, ...own,
      legend: {
        orientation: "h", x: -0.01, xanchor: "left", y: -TITLE_HEIGHT / inner, yanchor: "top",
        entrywidthmode: "pixels", entrywidth: legend.entrywidth, ...own.legend,
      },
    };
    if (bars && canvas.clientWidth < NARROW) { // long names would leave no width for the bars
      layout.yaxis.ticktext = layout.yaxis.ticktext.map((name) => name.replaceAll(" ", "<br>"));
    }
    if (!own.xaxis?.tickvals) {
      layout.xaxis = { nticks: Math.max(3, Math.floor(canvas.clientWidth / 90)), ...layout.xaxis };
    }
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = { automargin: true, showline: true, ticks: "outside", ...layout[axis] };
      layout[axis].title = { standoff: 14, ...layout[axis].title };
    }
    for (const [name, value] of Object.entries(themed())) { // drawn once, in the right colours
      const path = name.split(".");
      const last = path.pop();
      path.reduce((inside, key) => (inside[key] ??= {}), layout)[last] = value;
    }
    return layout;
  }

  // The svg gets a viewBox, so that paper of any width scales it.
  function scalable(canvas) {
    const { width, height } = canvas._fullLayout;
    for (const svg of canvas.querySelectorAll("svg.main-svg")) {
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    }
    canvas.style.setProperty("--ratio", `${width} / ${height}`);
  }

  function draw(canvas) {
    const spec = specs[canvas.dataset.figure];
    const config = { displaylogo: false, displayModeBar: false, doubleClick: "reset" };
    canvas.dataset.width = String(canvas.clientWidth);
    return Plotly.react(canvas, spec.data, layoutOf(spec, canvas), config).then(() => {
      if (!canvas.dataset.drawn) {
        canvas.on("plotly_afterplot", () => scalable(canvas));
        canvas.dataset.drawn = "yes";
      }
      // The margins are known only now: the legend begins at the left edge and may be as wide as the figure.
      const { l, w, h } = canvas._fullLayout._size;
      const position = { "legend.x": -(l - 6) / w, "legend.y": -TITLE_HEIGHT / h };
      return canvas._fullLayout.showlegend ? Plotly.relayout(canvas, position) : null;
    }).then(() => scalable(canvas)).catch((error) => {
      canvas.textContent = "This plot could not be drawn; its figures are in the tables.";
      console.error(error);
    });
  }

  // Another width needs another height (plotly.js would keep the old one). Paper scales the drawn plot.
  let settled = 0;
  window.addEventListener("resize", () => {
    window.clearTimeout(settled);
    settled = window.setTimeout(() => {
      if (!paper && !window.matchMedia("print").matches) {
        canvases.filter((canvas) => canvas.dataset.width !== String(canvas.clientWidth)).forEach(draw);
      }
    }, 80);
  });

  // ---- tables ---------------------------------------------------------------------------------------------------
  const ROWS_AT_ONCE = 100;
  const FOLDED = 90;
  const words = { FAIL: "bad", wrong: "bad", failed: "bad", timeout: "bad", worse: "bad", PASS: "good", ok: "good", better: "good",
    INCONCLUSIVE: "warn", NOT_RUN: "warn", skipped: "warn", "not comparable": "warn" };

  function prepare(table) {
    const id = table.id;
    const kinds = table.dataset.kinds;
    const body = table.tBodies[0];
    const all = longTables[id] ?? [...body.rows].map((row) => [...row.cells].map((cell) => cell.textContent));
    const filter = document.getElementById(`filter-${id}`);
    const count = document.getElementById(`count-${id}`);
    const more = document.querySelector(`button.more[data-table="${CSS.escape(id)}"]`);
    const heads = [...table.tHead.rows[0].cells];
    const state = { column: -1, down: false, limit: ROWS_AT_ONCE };

    function chosenRows() {
      const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      let rows = all;
      if (wanted.length) {
        rows = rows.filter((row) => {
          const text = row.join("\n").toLowerCase();
          return wanted.every((word) => text.includes(word));
        });
      }
      if (state.column >= 0) {
        const k = state.column;
        const sign = state.down ? -1 : 1;
        const compare = kinds[k].toLowerCase() === "n"
          ? (a, b) => byNumber(a[k], b[k], sign)
          : (a, b) => sign * a[k].localeCompare(b[k], "en", { numeric: true });
        rows = [...rows].sort(compare);
      }
      return rows;
    }

    // Cells without a figure are last in both directions.
    function byNumber(a, b, sign) {
      const [x, y] = [parseFloat(a), parseFloat(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) {
        return Number(Number.isNaN(x)) - Number(Number.isNaN(y));
      }
      return sign * (x - y);
    }

    function show() {
      const rows = chosenRows();
      const part = rows.slice(0, state.limit);
      body.replaceChildren(...part.map(rowOf));
      const shown = part.length < rows.length ? `${part.length} shown of ` : "";
      count.textContent = `${shown}${rows.length} of ${all.length} rows`;
      more.hidden = part.length === rows.length;
    }

    function rowOf(cells) {
      const row = document.createElement("tr");
      cells.forEach((text, k) => {
        const cell = row.insertCell();
        const inner = document.createElement("bdi");
        inner.textContent = text;
        cell.append(kinds[k].toLowerCase() === "d" && text.length > FOLDED ? folded(text, inner) : inner);
        cell.classList.add(kinds[k]);
        if (words[text]) {
          cell.classList.add(words[text]);
        }
      });
      return row;
    }

    // Text that is too long for a row opens with a click or a key; paper shows all of it.
    function folded(text, inner) {
      const details = document.createElement("details");
      const summary = document.createElement("summary");
      summary.textContent = `${text.slice(0, FOLDED - 20).split("\n")[0]} …`;
      details.append(summary, inner);
      return details;
    }

    heads.forEach((head, k) => head.querySelector("button").addEventListener("click", () => {
      state.down = state.column === k ? !state.down : false;
      state.column = k;
      heads.forEach((other, j) => other.setAttribute("aria-sort", j !== k ? "none" : state.down ? "descending" : "ascending"));
      show();
    }));
    filter.addEventListener("input", show);
    more.addEventListener("click", () => {
      state.limit = Infinity;
      show();
    });
    show();
  }

  // ---- start ----------------------------------------------------------------------------------------------------
  document.querySelectorAll("table[data-kinds]").forEach(prepare);
  if (button) {
    button.addEventListener("click", () => {
      chosen = isDark() ? "light" : "dark";
      applyTheme();
    });
  }
  wantsDark.addEventListener("change", applyTheme);
  let closed = []; // details that are closed on the screen; paper shows all
  // Paper is always printed in the light theme.
  window.addEventListener("beforeprint", () => {
    paper = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    applyTheme();
  });
  window.addEventListener("afterprint", () => {
    paper = false;
    closed.forEach((details) => { details.open = false; });
    applyTheme();
  });
  applyTheme();
  Promise.all(canvases.map(draw)).then(() => {
    root.dataset.ready = "yes";
  });
})();
