// A worker that lives in a frame of the page, for the search: browsers refuse real workers to pages that are files.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super()
    const frame = Object.assign(document.createElement("iframe"), {hidden: true})
    document.body.append(frame)
    const inner = frame.contentWindow
    inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
    inner.importScripts = () => {}
    const script = inner.document.createElement("script")
    this.ready = new Promise(resolve => script.onload = () => resolve(inner))
    inner.document.body.append(Object.assign(script, {src: url}))
  }

  postMessage(data) {
    this.ready.then(inner => inner.dispatchEvent(new inner.MessageEvent("message", {data})))
  }
}
