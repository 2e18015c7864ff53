// Runs before the first paint, so that a chosen theme does not flash. The choice is all that is kept in the browser.
(() => {
  let choice = null;
  try {
    choice = localStorage.getItem("appliance-theme");
  } catch {
    // storage may be off: then the system decides
  }
  if (choice === "dark" || choice === "light") document.documentElement.dataset.theme = choice;
})();
