// Two comforts, both optional: click a picture to enlarge it, press a button to copy a snippet.
const dialog = document.getElementById("enlarged");
document.querySelectorAll("main img, header img").forEach((image) => {
  image.addEventListener("click", () => {
    const large = dialog.querySelector("img");
    large.src = image.src;
    large.alt = image.alt;
    dialog.querySelector("figcaption").textContent = image.dataset.caption;
    dialog.showModal();
  });
});
dialog.addEventListener("click", () => dialog.close());
if (navigator.clipboard) {
  document.querySelectorAll(".snippet button").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  });
}
