// Make an element; texts are set as text, never as markup.
export function element(tag, name = "", properties = {}) {
    const made = document.createElement(tag)
    if (name) made.className = name
    return Object.assign(made, properties)
}
