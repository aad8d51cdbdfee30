// Day or night: the reader's choice, kept by the browser; without one, the system's.
document.documentElement.lang = "en";
window.ranksearchTheme = function (clicks) {
  const root = document.documentElement;
  let chosen = null;
  try { chosen = localStorage.getItem("ranksearch-theme"); } catch (error) { /* storage is forbidden: forget it */ }
  const night = chosen ? chosen === "night" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (clicks) {
    chosen = night ? "day" : "night";
    try { localStorage.setItem("ranksearch-theme", chosen); } catch (error) { /* as above */ }
  }
  if (chosen) root.dataset.theme = chosen;
  return root.dataset.theme || "";
};

// Dash calls a group of radio buttons a list box, without a name, and each button's label an option of it. A screen
// reader is told what they are: radio buttons, in a group that has the name of its legend.
new MutationObserver(function () {
  for (const group of document.querySelectorAll(".dash-radioitems[role=listbox]")) {
    const legend = group.closest("fieldset")?.querySelector("legend");
    group.setAttribute("role", "radiogroup");
    if (legend) group.setAttribute("aria-label", legend.textContent);
  }
  for (const label of document.querySelectorAll(".dash-radioitems label[role], .dash-radioitems label[aria-selected]")) {
    label.removeAttribute("role");
    label.removeAttribute("aria-selected");
  }
}).observe(document.documentElement, {
  childList: true, subtree: true, attributes: true, attributeFilter: ["role", "aria-selected"],
});

// What the page itself brought of the front goes when Plotly has drawn it.
new MutationObserver(function (_, watching) {
  if (!document.querySelector("#front .scatterlayer .trace")) return;
  document.getElementById("first-look")?.remove();
  watching.disconnect();
}).observe(document.documentElement, { childList: true, subtree: true });
