const dashes = ["solid", "dash", "dot"];

function tracesOf(chart) {
  return chart.series.map((series) => ({
    x: series.x, y: series.y, customdata: series.steps, name: data.runs[series.run], type: "scatter",
    mode: series.kind === "validation" ? "lines+markers" : "lines",
    opacity: series.kind === "step" ? 0.35 : 1,
    marker: { size: 5 },
    line: {
      // With one run, the validation loss has its own color.
      color: color(`--run-${(data.runs.length === 1 && series.kind === "validation" ? 1 : series.run) % 5}`),
      dash: dashes[series.run % 3],
      width: series.kind === "step" ? 1 : 2,
    },
    hovertemplate: `%{fullData.name}${series.label}<br>step %{customdata:,}<br>%{x${chart.xdigits}} ${chart.xunit}` +
      `<br>${chart.ylabel}: %{y:${chart.digits}}<extra></extra>`,
  }));
}

function draw() {
  data.charts.forEach((chart, number) => {
    const layout = layoutOf({ l: 10, r: 10, t: 30, b: 10 });
    layout.xaxis.uirevision = layout.yaxis.uirevision = "kept";  // drawing again keeps the zoom
    Object.assign(layout.xaxis, { title: { text: chart.xlabel } });
    Object.assign(layout.yaxis, { title: { text: chart.ylabel } });
    if (chart.range) layout.yaxis.range = chart.range;
    if (chart.digits.endsWith("e")) layout.yaxis.exponentformat = "e";  // learning rates are written as 3e-4, not as 300µ
    layout.shapes = chart.levels.map((level) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: level.value, y1: level.value,
      line: { color: color("--quiet"), width: 1.5, dash: "dash" },
    }));
    // The labels are side by side, so that those of close lines do not overlap.
    layout.annotations = chart.levels.map((level, i) => ({
      xref: "paper", x: 0.01 + 0.25 * (i % 4), xanchor: "left", y: level.value, yanchor: "bottom", text: level.label,
      showarrow: false, bgcolor: color("--page"), borderpad: 0, font: { size: 10, color: color("--text") },
    }));
    Plotly.react(`chart-${number}`, tracesOf(chart), layout, plotConfig);
  });
  showChosen();
}

function showChosen() {
  const off = (name) => new Set([...document.querySelectorAll(`input[data-${name}]:not(:checked)`)].map((i) => i.dataset[name]));
  const runs = off("run"), kinds = off("kind");
  data.charts.forEach((chart, number) => {
    const visible = chart.series.map((s) => !runs.has(String(s.run)) && !kinds.has(s.kind));
    Plotly.restyle(`chart-${number}`, { visible });
  });
}

document.querySelectorAll(".controls input").forEach((input) => input.addEventListener("change", showChosen));
drawAndFollowTheme(draw);
