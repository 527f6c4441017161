// Where frames come from in the browser: camera, screen or a video file, always as the newest frame of a <video>.
const REASONS = {
  NotAllowedError: "The browser or the user refused it. Allow it beside the address, then press Start.",
  NotFoundError: "No camera was found. Connect one, or choose a video file.",
  NotReadableError: "Another program uses the camera. Close it, then press Start.",
  OverconstrainedError: "The camera cannot do this. Choose another one.",
};

// Milliseconds without a new frame until the last one counts again. A screen at rest gives none, and none is announced in a hidden page.
const REST = 200;

export class Source {
  constructor(video, onFrame) {
    Object.assign(this, { video, onFrame, token: 0, stream: null, kind: "" });
    video.muted = video.loop = video.playsInline = true;
  }

  /** Open a source, of cameras the one of that id; throws an Error whose message is one sentence with the remedy. */
  async open(kind, file, camera = "") {
    this.close();
    const token = ++this.token;
    if (kind === "file") {
      if (!file) throw new Error("Choose a video file first.");
      this.video.src = URL.createObjectURL(file);
    } else {
      const stream = await this.device(kind, camera);
      if (token !== this.token) return stream.getTracks().forEach((track) => track.stop());
      this.stream = stream;
      this.video.srcObject = stream;
      stream.getVideoTracks()[0].addEventListener("ended", () => token === this.token && this.close());
    }
    this.kind = kind;
    try {
      await this.video.play();
    } catch {
      if (token !== this.token) return;
      this.close();
      throw new Error(kind === "file" ? "The browser cannot play this video, or the page forbids it (ComfyUI with --disable-api-nodes does). Choose an MP4 or WebM file." : "The source gives no images.");
    }
    this.watch(token);
  }

  /** [id, name] of each camera that the page may know: none before one was allowed. */
  async cameras() {
    const found = (await navigator.mediaDevices?.enumerateDevices().catch(() => [])) ?? [];
    return found.filter((d) => d.kind === "videoinput" && d.deviceId).map((d, i) => [d.deviceId, d.label || `Camera ${i + 1}`]);
  }

  /** The id of the camera that is open, or "". */
  get camera() {
    return (this.kind === "camera" && this.stream?.getVideoTracks()[0]?.getSettings().deviceId) || "";
  }

  async device(kind, camera = "") {
    const devices = navigator.mediaDevices;
    if (!devices) throw new Error("The browser gives cameras to pages of localhost and https only. Open this page there, or choose a video file.");
    try {
      if (kind === "screen") return await devices.getDisplayMedia({ video: { frameRate: 30 }, audio: false });
      const wanted = { width: { ideal: 1280 }, height: { ideal: 720 }, frameRate: { ideal: 30 } };
      return await devices.getUserMedia({ video: camera ? { ...wanted, deviceId: { exact: camera } } : wanted, audio: false });
    } catch (error) {
      if (camera && ["OverconstrainedError", "NotFoundError"].includes(error.name)) return this.device(kind); // it was taken away
      throw new Error(REASONS[error.name] ?? `The source cannot be opened (${error.message}).`);
    }
  }

  /** Call onFrame(time of capture) for each new frame, and for the last one again where none comes: a changed prompt is to be seen then too. */
  watch(token) {
    const video = this.video;
    let [timer, handle] = [0, 0];
    const step = (now, data) => {
      clearTimeout(timer);
      if (token !== this.token) return;
      const captured = data?.captureTime;
      this.onFrame(captured > now - 1000 && captured <= performance.now() ? captured : performance.now());
      next();
    };
    const again = () => {
      video.cancelVideoFrameCallback?.(handle);
      step(performance.now());
    };
    const next = () => {
      handle = video.requestVideoFrameCallback?.(step);
      timer = setTimeout(again, handle === undefined ? 33 : REST);
    };
    next();
  }

  get opened() {
    return Boolean(this.kind);
  }

  close() {
    this.token += 1;
    this.kind = "";
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = null;
    this.video.pause();
    if (this.video.src) URL.revokeObjectURL(this.video.src);
    this.video.removeAttribute("src");
    this.video.srcObject = null;
  }
}
