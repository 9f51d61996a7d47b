// Lets long names of functions break after an underscore, in headings, the sidebar and the text.
document.addEventListener("DOMContentLoaded", () => {
  const places = "h1, .sidebar-tree .reference, .toc-tree .reference, .sig-name, code.literal";
  for (const place of document.querySelectorAll(places)) {
    const walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
    const texts = [];
    while (walker.nextNode()) texts.push(walker.currentNode);
    for (const text of texts) {
      const [first, ...others] = text.data.split(/(?<=[_(]|\w\.)/);
      text.replaceWith(first, ...others.flatMap((part) => [document.createElement("wbr"), part]));
    }
  }
});
