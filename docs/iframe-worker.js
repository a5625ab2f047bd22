// The site's search when a page is opened from disk, where browsers start no workers: the worker's script runs in a
// hidden frame instead. The name is one that mkdocs-material's plugin `offline` looks for; else it loads its own from
// another host.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      const waiting = [];
      this.postMessage = (message) => waiting.push(message);
      const tell = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }));
      addEventListener("message", (event) => event.source === frame.contentWindow && tell(this, event.data));
      frame.hidden = true;
      frame.srcdoc =
        '<script>postMessage = (message) => parent.postMessage(message, "*")</script>' +
        `<script src="${url}"></script>`;
      frame.onload = () => {
        this.postMessage = (message) => tell(frame.contentWindow, message);
        waiting.forEach(this.postMessage);
      };
      document.body.append(frame);
    }
  };
}
