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
  let chosen = null; // what the reader has chosen; until then the system decides
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

  // ---- plots ----------------------------------------------------------------------------------------------------
  function layoutOf(spec, canvas) {
    const { square, bars, ...own } = structuredClone(spec.layout);
    const named = spec.data.filter((trace) => trace.name).length;
    const width = canvas.clientWidth;
    let height = 400 + 18 * Math.max(0, Math.ceil(named / Math.max(1, Math.floor(width / 190))) - 1);
    if (square) {
      height = Math.max(340, Math.min(620, width));
    }
    if (bars) {
      height = Math.max(height, 190 + 34 * bars);
    }
    const layout = {
      height, autosize: true, margin: { l: 62, r: 16, t: 10, b: 56 },
      font: { family: getComputedStyle(document.body).fontFamily, size: 12 },
      showlegend: named > 1,      hovermode: "closest", hoverlabel: { align: "left" }, dragmode: false, ...own,
      legend: { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top", ...own.legend },
    };
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = { automargin: true, showline: true, ticks: "outside", ...layout[axis] };
      layout[axis].title = { standoff: 14, ...layout[axis].title };
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
    const layout = layoutOf(spec, canvas);
    const config = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
    return Plotly.newPlot(canvas, spec.data, layout, config).then(() => {
      canvas.on("plotly_afterplot", () => scalable(canvas));
      canvas.dataset.drawn = "yes";
      return Plotly.relayout(canvas, themed());
    }).then(() => scalable(canvas)).catch((error) => {
      canvas.textContent = "This plot could not be drawn; its figures are in the tables.";
      console.error(error);
    });
  }

  // ---- tables ---------------------------------------------------------------------------------------------------
  const ROWS_AT_ONCE = 100;
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

    // What has no figure stands last, whichever way round.
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
        cell.append(inner);
        cell.classList.add(kinds[k]);
        if (words[text]) {
          cell.classList.add(words[text]);
        }
      });
      return row;
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
  // Ink is dark and paper is white.
  window.addEventListener("beforeprint", () => {
    paper = true;
    applyTheme();
  });
  window.addEventListener("afterprint", () => {
    paper = false;
    applyTheme();
  });
  applyTheme();
  Promise.all(canvases.map(draw)).then(() => {
    root.dataset.ready = "yes";
  });
})();
