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
