// A point cloud that turns: points by three.js, boxes of its objects as wire frames. Without WebGL, points on a plain canvas.
import {
  Box3, BufferAttribute, BufferGeometry, EdgesGeometry, BoxGeometry, Group, LineBasicMaterial, LineSegments, PerspectiveCamera, Points,
  PointsMaterial, Scene, Vector3, WebGLRenderer, Color, Matrix4,
} from "./three/three.module.js";

export const HUES = ["#d1495b", "#2a7de1", "#2e933c", "#b7791f", "#7b5ea7", "#00798c", "#8d6a3f", "#5c677d"];
const UP = new Vector3(0, 0, 1);

// Reads what the server sends: the number of points, float32 xyz of each, uint8 rgb of each.
export function readPoints(buffer) {
  const count = new DataView(buffer).getUint32(0, true);
  return { count, xyz: new Float32Array(buffer.slice(4, 4 + 12 * count)), rgb: new Uint8Array(buffer, 4 + 12 * count, 3 * count) };
}

export class CloudView {
  constructor(canvas) {
    this.canvas = canvas;
    this.yaw = -0.6; this.pitch = 0.6; this.zoom = 1;
    this.points = null; this.objects = []; this.picked = -1;
    this.camera = new PerspectiveCamera(38, 1, 0.01, 1000);
    try {
      this.renderer = new WebGLRenderer({ canvas, antialias: true, alpha: true, preserveDrawingBuffer: true });
    } catch {
      this.renderer = null;
      this.plain = canvas.getContext("2d");
    }
    this.listen();
  }

  listen() {
    const at = new Map();
    this.canvas.addEventListener("pointerdown", (event) => {
      at.set(event.pointerId, [event.clientX, event.clientY]);
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const before = at.get(event.pointerId);
      if (!before) return;
      const now = [event.clientX, event.clientY];
      if (at.size === 2) {
        const [other] = [...at].filter(([id]) => id !== event.pointerId).map(([, place]) => place);
        const span = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
        this.turn(0, 0, span(now) / Math.max(span(before), 1));
      } else this.turn((now[0] - before[0]) * 0.008, (now[1] - before[1]) * 0.008);
      at.set(event.pointerId, now);
    });
    for (const end of ["pointerup", "pointercancel"]) this.canvas.addEventListener(end, (event) => at.delete(event.pointerId));
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.turn(0, 0, Math.exp(-event.deltaY * 0.0012));
    }, { passive: false });
    const keys = { ArrowLeft: [-0.12, 0], ArrowRight: [0.12, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1], "+": [0, 0, 1.15], "=": [0, 0, 1.15], "-": [0, 0, 1 / 1.15] };
    this.canvas.addEventListener("keydown", (event) => {
      if (!keys[event.key]) return;
      event.preventDefault();
      this.turn(...keys[event.key]);
    });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  turn(yaw, pitch, zoom = 1) {
    this.yaw -= yaw;
    this.pitch = Math.min(1.5, Math.max(-0.2, this.pitch + pitch));
    this.zoom = Math.min(8, Math.max(0.4, this.zoom * zoom));
    this.draw();
  }

  show(points, objects) {
    Object.assign(this, { points, objects, picked: -1, yaw: -0.6, pitch: 0.6, zoom: 1 });
    const geometry = new BufferGeometry();
    geometry.setAttribute("position", new BufferAttribute(points.xyz, 3));
    geometry.setAttribute("color", new BufferAttribute(points.rgb, 3, true));
    const box = new Box3().setFromBufferAttribute(geometry.getAttribute("position"));
    this.centre = box.getCenter(new Vector3());
    this.radius = Math.max(box.getSize(new Vector3()).length() / 2, 1e-3);
    this.group?.traverse((thing) => { thing.geometry?.dispose(); thing.material?.dispose(); });
    this.scene = new Scene();
    this.group = new Group();
    this.scene.add(this.group);
    this.material = new PointsMaterial({ size: this.radius * Math.min(0.03, Math.max(0.006, 2 / Math.sqrt(points.count))), vertexColors: true });
    this.group.add(new Points(geometry, this.material));
    this.frames = objects.map((object, index) => {
      const [x1, y1, z1, x2, y2, z2] = object.box;
      const edges = new EdgesGeometry(new BoxGeometry(x2 - x1, y2 - y1, z2 - z1));
      const lines = new LineSegments(edges, new LineBasicMaterial({ color: new Color(HUES[index % HUES.length]), transparent: true }));
      lines.position.set((x1 + x2) / 2, (y1 + y2) / 2, (z1 + z2) / 2);
      this.group.add(lines);
      return lines;
    });
    this.draw();
  }

  pick(index) {
    this.picked = index;
    this.draw();
  }

  draw() {
    if (!this.points || !this.canvas.clientWidth) return;
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const away = (1.15 * this.radius) / Math.tan((this.camera.fov * Math.PI) / 360) / this.zoom / Math.min(1, width / height);
    const level = Math.cos(this.pitch);
    this.camera.up.copy(UP);
    this.camera.position.set(
      this.centre.x + away * level * Math.sin(this.yaw), this.centre.y - away * level * Math.cos(this.yaw), this.centre.z + away * Math.sin(this.pitch));
    this.camera.lookAt(this.centre);
    this.camera.aspect = width / height;
    this.camera.near = away / 100; this.camera.far = away + 4 * this.radius;
    this.camera.updateProjectionMatrix();
    this.frames.forEach((lines, index) => { lines.material.opacity = this.picked < 0 || this.picked === index ? 1 : 0.15; });
    if (this.renderer) {
      this.renderer.setPixelRatio(Math.min(devicePixelRatio, 2));
      this.renderer.setSize(width, height, false);
      this.renderer.render(this.scene, this.camera);
    } else this.paint(width, height);
  }

  paint(width, height) {
    this.canvas.width = width; this.canvas.height = height;
    this.camera.updateMatrixWorld();
    const m = new Matrix4().multiplyMatrices(this.camera.projectionMatrix, this.camera.matrixWorldInverse).elements;
    const project = (x, y, z) => {
      const w = m[3] * x + m[7] * y + m[11] * z + m[15];
      return [width * (0.5 + (m[0] * x + m[4] * y + m[8] * z + m[12]) / w / 2), height * (0.5 - (m[1] * x + m[5] * y + m[9] * z + m[13]) / w / 2), w];
    };
    const { xyz, rgb, count } = this.points;
    const seen = Array.from({ length: count }, (_, i) => [...project(xyz[3 * i], xyz[3 * i + 1], xyz[3 * i + 2]), i]);
    seen.sort((a, b) => b[2] - a[2]);
    for (const [x, y, , i] of seen) {
      this.plain.fillStyle = `rgb(${rgb[3 * i]},${rgb[3 * i + 1]},${rgb[3 * i + 2]})`;
      this.plain.fillRect(x - 1, y - 1, 2.4, 2.4);
    }
    this.objects.forEach(({ box }, index) => {
      const corners = Array.from({ length: 8 }, (_, c) => project(box[c & 1 ? 3 : 0], box[c & 2 ? 4 : 1], box[c & 4 ? 5 : 2]));
      this.plain.strokeStyle = HUES[index % HUES.length];
      this.plain.globalAlpha = this.picked < 0 || this.picked === index ? 1 : 0.15;
      this.plain.lineWidth = 1.5;
      this.plain.beginPath();
      for (let a = 0; a < 8; a++) for (const bit of [1, 2, 4]) if (!(a & bit)) {
        this.plain.moveTo(corners[a][0], corners[a][1]);
        this.plain.lineTo(corners[a | bit][0], corners[a | bit][1]);
      }
      this.plain.stroke();
    });
    this.plain.globalAlpha = 1;
  }
}
