"use strict";
const data = JSON.parse(document.getElementById("data").textContent);

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// What every plotly chart has in common, in the colours of the moment.
function layoutOf(margin) {
  const axis = {
    color: color("--quiet"), gridcolor: color("--line"), zeroline: false, automargin: true, exponentformat: "B",
    title: { standoff: 8 },
  };
  return {
    paper_bgcolor: color("--page"), plot_bgcolor: color("--page"), font: { color: color("--text"), size: 12 },
    hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--text") }, namelength: -1 },
    // a finger that drags scrolls the page
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    modebar: { color: color("--quiet"), activecolor: color("--text"), bgcolor: "transparent" },
    margin, hovermode: "closest", showlegend: false, xaxis: { ...axis }, yaxis: { ...axis },
  };
}

const plotConfig = {
  displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "pan2d"],
  showSendToCloud: false, plotlyServerURL: "",  // its button would upload the figures
};

// A browser sends mouse events after a tap: where a finger does not drag, plotly takes them for a second tap, hides the
// tooltip of the first, and undoes the zoom.
document.addEventListener("touchend", (event) => {
  if (event.cancelable && event.target.closest(".draglayer")) event.preventDefault();
}, { passive: false });

function drawAgainWhenTheThemeChanges(draw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
}
