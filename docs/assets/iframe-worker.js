// The search of pages that are opened from disk: browsers start no worker from a file, so a hidden frame runs its script.
// The theme asks for a file of this name where its plugin `offline` is on.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.ready = new Promise((done) => this.frame.addEventListener("load", done, { once: true }));
      addEventListener("message", (event) => {
        if (event.source !== this.frame.contentWindow) return;
        const told = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(told);
        this.onmessage?.(told);
      });
      // In a worker `postMessage(data)` goes to the page; with a target it is the frame's own, by which the page tells it.
      const opening =
        "const own = postMessage.bind(window);" +
        "window.postMessage = (data, target) => target ? own(data, target) : parent.postMessage(data, '*');" +
        "window.importScripts = () => {};";
      this.frame.srcdoc = `<script>${opening}</script><script src="${new URL(url, location.href)}"></script>`;
      document.documentElement.append(this.frame);
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.postMessage(data, "*"));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
