// What is asked for with every question. Kept as long as the tab is open: the key must not outlive it.

const NUMBERS = ["temperature", "max_tokens", "seed"];

export class Settings {
  /** store(): where they are kept; a browser that keeps nothing may throw at the mere question. */
  constructor(form, store) {
    this.form = form;
    this.store = store;
    const kept = this.kept();
    for (const field of form.elements) field.value = kept[field.name] ?? field.value;
    form.addEventListener("input", () => this.keep());
  }

  /** Numbers are null where nothing is given: the server's own default counts. */
  get values() {
    const given = Object.fromEntries([...this.form.elements].map((field) => [field.name, field.value.trim()]));
    const numbers = NUMBERS.map((name) => [name, given[name] === "" ? null : Number(given[name])]);
    return { ...given, ...Object.fromEntries(numbers) };
  }

  kept() {
    try {
      return JSON.parse(this.store().getItem("settings")) ?? {};
    } catch {
      return {}; // nothing is kept, or something else under this name
    }
  }

  keep() {
    const fields = Object.fromEntries([...this.form.elements].map((field) => [field.name, field.value]));
    try {
      this.store().setItem("settings", JSON.stringify(fields));
    } catch {
      return; // then they last until the page is loaded anew
    }
  }
}
